#!/bin/sh
# Asks a running server a few questions and fails loudly at the first wrong answer.
#
#   deploy/smoke.sh [BASE_URL]     default http://127.0.0.1:8000
set -eu

base=${1:-http://127.0.0.1:8000}
base=${base%/}
body=$(mktemp)
trap 'rm -f "$body"' EXIT INT TERM

fail() {
    printf 'smoke: FAILED: %s\n' "$1" >&2
    printf 'smoke: the answer was:\n' >&2
    head -c 2000 "$body" >&2
    printf '\n' >&2
    exit 1
}

# request WHAT STATUS PATH [CURL OPTION...]: the answer goes to $body and must have that status.
request() {
    what=$1 expected=$2 path=$3
    shift 3
    : >"$body"
    status=$(curl --silent --show-error --max-time 60 --output "$body" --write-out '%{http_code}' "$@" "$base$path") ||
        fail "$what: no answer from $base$path"
    [ "$status" = "$expected" ] || fail "$what: expected status $expected from $path, got $status"
}

post() {
    request "$1" "$2" "$3" --header 'content-type: application/json' --data "$4"
}

# expect WHAT PATTERN: a line of the last answer must match the extended regular expression.
expect() {
    grep --extended-regexp --quiet "$2" "$body" || fail "$1: expected to find $2"
    printf 'smoke: ok: %s\n' "$1"
}

request 'health' 200 /health
expect 'health' ''

request 'models' 200 /v1/models
expect 'models' '"object": ?"list"'
model=$(sed -n 's/.*"id": *"\([^"]*\)".*/\1/p' "$body" | head -n 1)
[ -n "$model" ] || fail 'models: expected the id of a model'

prompt='"prompt": "def fibonacci(n):\n", "max_tokens": 16, "temperature": 0'
post 'completion' 200 /v1/completions "{\"model\": \"$model\", $prompt}"
expect 'completion has text' '"text": ?"[^"]+'
expect 'completion has a finish reason' '"finish_reason": ?"(stop|length)"'
expect 'completion has usage' '"completion_tokens": ?[1-9]'
expect 'completion tells how it was drafted' '"skippy": ?\{'

post 'stream' 200 /v1/completions "{\"model\": \"$model\", $prompt, \"stream\": true}"
expect 'stream has chunks' '^data: \{'
expect 'stream ends with [DONE]' '^data: \[DONE\]'

post 'unknown model' 404 /v1/completions "{\"model\": \"no-such-model\", $prompt}"
expect 'unknown model is an error in OpenAI form' '"error": ?\{.*"message"'
post 'malformed JSON' 400 /v1/completions '{"prompt": '
expect 'malformed JSON is an error in OpenAI form' '"error": ?\{.*"message"'
post 'bad value' 400 /v1/completions "{\"model\": \"$model\", \"prompt\": \"a\", \"max_tokens\": -1}"
expect 'bad value names its parameter' '"param": ?"max_tokens"'

request 'metrics' 200 /metrics
expect 'metrics count generated tokens' '^skippy_generation_tokens_total(\{[^}]*\})? [1-9]'
expect 'metrics count finished requests' '^skippy_requests_total\{[^}]*finish_reason="(stop|length)"[^}]*\} [1-9]'
expect 'metrics count drafts' '^skippy_spec_decode_num_drafts_total'

printf 'smoke: all good at %s\n' "$base"

"""Skippy's OpenAI-compatible server and its commands. Import it as `skippy.server`."""

if __name__ != "skippy.server":
    raise ImportError(f"import this package as 'skippy.server', not as {__name__!r}")

DISTRIBUTION = "skippy-serve"
"""The name that Skippy is installed under."""

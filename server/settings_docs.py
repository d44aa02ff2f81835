"""Writes what is said about the settings elsewhere: the table in README.md and `.env.example`.

Run `python -m skippy.server.settings_docs` in the repository after changing a setting.
"""

from __future__ import annotations

from pathlib import Path

from skippy.server.settings import Settings, default_text, flag_of, is_switch, kind_of, setting_names, variable_of

TABLE_BEGIN = "<!-- settings: written by python -m skippy.server.settings_docs -->\n"
TABLE_END = "<!-- end of settings -->\n"

_ENV_HEADER = """\
# Settings of Skippy, each at its default, for Docker Compose: copy to .env and uncomment what you change.
# Compose itself sets SKIPPY_HOST and SKIPPY_PORT. Without Compose nobody reads .env: export the variables.
# Written by python -m skippy.server.settings_docs.
"""


def description_of(name: str) -> str:
    return str(Settings.model_fields[name].description)


def markdown_table() -> str:
    rows = ["| flag | variable | values | default | meaning |", "|---|---|---|---|---|"]
    for name in setting_names():
        flag = "`MODEL`" if name == "model" else f"`{flag_of(name)}`"
        if is_switch(name):
            flag += f", `--no-{flag_of(name).removeprefix('--')}`"
        default = f"`{default_text(name)}`" if default_text(name) else ""
        values = kind_of(name).replace("|", ", ")
        rows.append(f"| {flag} | `{variable_of(name)}` | {values} | {default} | {description_of(name)} |")
    return "\n".join(rows) + "\n"


def env_example() -> str:
    entries = [
        f"\n# {description_of(name)} ({kind_of(name)})\n#{variable_of(name)}={default_text(name)}\n"
        for name in setting_names()
    ]
    return _ENV_HEADER + "".join(entries)


def with_table(readme: str) -> str:
    """`readme` with the text between the two marks replaced by the table."""
    before, _, rest = readme.partition(TABLE_BEGIN)
    _, _, after = rest.partition(TABLE_END)
    return f"{before}{TABLE_BEGIN}\n{markdown_table()}\n{TABLE_END}{after}"


def main() -> None:
    readme = Path("README.md")
    readme.write_text(with_table(readme.read_text(encoding="utf-8")), encoding="utf-8")
    Path(".env.example").write_text(env_example(), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Write docs/settings.md's table of CAPO's fields from the fields themselves.

python scripts/settings.py            # rewrites what stands between the marks; the suite compares
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from capo_rl.settings.own_fields import CAPOFields
from capo_rl.settings.train_help import GROUPS

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"
BEGIN, END = "<!-- drawn by scripts/settings.py -->", "<!-- to here -->"


def drawn() -> str:
    """A table for each group of fields: name, default, choices and help."""
    known = {field.name: field for field in fields(CAPOFields)}
    lines = []
    for group, names in GROUPS.items():
        lines += [f"## {group[0].upper()}{group[1:]}", "", "| field | default | |", "|---|---|---|"]
        for name in names:
            field = known[name]
            default = "null" if field.default is None else str(field.default).lower().replace("e-0", "e-")
            choices = field.metadata.get("choices")
            said = " ".join(str(field.metadata["help"]).replace("%%", "%").replace("|", "\\|").split())
            lines.append(
                f"| `{name}` | `{default}` | {said}{' One of ' + ', '.join(choices) + '.' if choices else ''} |"
            )
        lines.append("")
    return "\n".join(lines)


def page(text: str) -> str:
    """The page with its drawn part made anew."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{drawn()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")

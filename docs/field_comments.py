"""Extension of Griffe: comments beside the fields of a class become attributes of its docstring."""

from __future__ import annotations

import ast
import re

import griffe

_COMMENT = re.compile(r"(?:^|\s)#:? (.*)$")


def _comment(field: griffe.Attribute) -> str:
    """Returns the comment at the end of a field's line, or in the lines above it; else ""."""
    lines = field.parent.lines_collection[field.filepath] if field.parent else []
    if not field.lineno or not field.endlineno:
        return ""
    if beside := _COMMENT.search(lines[field.endlineno - 1]):
        return beside[1]
    above: list[str] = []
    for line in reversed(lines[: field.lineno - 1]):
        if not line.strip().startswith("# "):
            break
        above.insert(0, line.strip()[2:])
    return " ".join(above)


class FieldComments(griffe.Extension):
    """Describes the fields of classes whose docstring has no section on them."""

    def on_class_members(self, *, node: ast.AST, cls: griffe.Class, **_: object) -> None:
        """Appends the section to the docstring."""
        if cls.docstring is None or "Attributes:" in cls.docstring.value:
            return
        fields = {
            name: field
            for name, field in cls.members.items()
            if isinstance(field, griffe.Attribute) and "property" not in field.labels
        }
        described = {name: text for name, field in fields.items() if (text := _comment(field))}
        if described:
            rows = "\n".join(f"    {name}: {text}" for name, text in described.items())
            cls.docstring.value = f"{cls.docstring.value.rstrip()}\n\nAttributes:\n{rows}"

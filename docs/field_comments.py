"""Extension of Griffe: comments beside the fields of a class become attributes of its docstring."""

from __future__ import annotations

import re

import griffe

_COMMENT = re.compile(r"(?:^|\s)# (.*)$")


def _comment(field: griffe.Attribute) -> str:
    """Returns the comment at the end of a field's line, or in the lines above it; else ""."""
    if not (field.parent and field.lineno and field.endlineno):
        return ""
    lines = field.parent.lines_collection[field.filepath]
    if beside := _COMMENT.search(lines[field.endlineno - 1]):
        return beside[1]
    above: list[str] = []
    for line in reversed(lines[: field.lineno - 1]):
        if not line.strip().startswith("# "):
            break
        above.insert(0, line.strip()[2:])
    return " ".join(above)


class FieldComments(griffe.Extension):
    """Describes fields that the docstring of their class does not, and hides private ones."""

    def on_class_members(self, *, cls: griffe.Class, **_: object) -> None:
        """Appends a section on the fields to a docstring without one."""
        if cls.docstring is None or "Attributes:" in cls.docstring.value:
            return
        described = {
            name: comment
            for name, field in cls.members.items()
            if isinstance(field, griffe.Attribute)
            and "property" not in field.labels
            and (comment := _comment(field))
        }
        if described:
            rows = "\n".join(f"    {name}: {comment}" for name, comment in described.items())
            cls.docstring.value = f"{cls.docstring.value.rstrip()}\n\nAttributes:\n{rows}"

    def on_package(self, *, pkg: griffe.Module, **_: object) -> None:
        """Takes private fields out of the signatures of dataclasses."""
        self._hide_private(pkg)

    def _hide_private(self, parent: griffe.Module | griffe.Class) -> None:
        for member in parent.members.values():
            if isinstance(member, griffe.Class) and "dataclass" in member.labels:
                for parameter in list(member.parameters):
                    if parameter.name.startswith("_"):
                        del member.parameters[parameter.name]
            if isinstance(member, griffe.Module | griffe.Class):
                self._hide_private(member)

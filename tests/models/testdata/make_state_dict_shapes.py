"""Writes the names and shapes of AVID-CMA's and GDT's state dicts, from clones of their code.

    python tests/models/testdata/make_state_dict_shapes.py AVID-CMA GDT

The two arguments are directories; the code needs torch and torchvision. Made from AVID-CMA
4538e40 and GDT 873e630, the newest when this was written.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

_MAKE = {
    "avid": (
        "import models; m = models.av_wrapper('R2Plus1D', {'depth': 18}, 'Conv2D', {'depth': 10},"
        " proj_dim=[512, 512, 128])"
    ),
    "gdt": "import model; m = model.GDT(use_mlp=True)",
}
_PRINT = (
    "import sys, types, json;"
    "sys.modules['torchvision._meta_registrations'] = types.ModuleType('empty');"
    "{make};"
    "print('\\n' + json.dumps({{k: list(v.shape) for k, v in m.state_dict().items()}}))"
)


def main(avid: str, gdt: str) -> None:
    """Writes avid.json and gdt.json beside this file."""
    for name, clone in {"avid": avid, "gdt": gdt}.items():
        program = _PRINT.format(make=_MAKE[name])
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=clone, capture_output=True, text=True, check=True
        )
        shapes = json.loads(done.stdout.splitlines()[-1])
        lines = ",\n".join(
            f"{json.dumps(key)}: {json.dumps(shape)}" for key, shape in shapes.items()
        )
        (Path(__file__).parent / f"{name}.json").write_text("{\n" + lines + "\n}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])

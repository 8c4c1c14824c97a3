"""A model with what others of the same network have learned added to its weights: theta + share (theta_add - theta_less).

    python tools/merge_models.py runs/student --add runs/teacher-long --less runs/teacher --out runs/carried

So a student follows its teacher that was trained on (the line above), or gains what some training gave to another student.
Measure whether it did; training goes on from the merged weights with `trigflow distill ... --from runs/carried`.
Source: Ilharco et al. 2023, "Editing models with task arithmetic" (arXiv 2212.04089).
"""

import argparse
import math
import sys
from pathlib import Path

from torch import Tensor

from trigflow import load
from trigflow.runtime.errors import UserError
from trigflow.runtime.files import write_folder, write_json


def merged(model: dict[str, Tensor], add: dict[str, Tensor], less: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """Weights that only the model has stay, as do whole numbers. Raises a UserError where the networks are not of one kind."""
    shapes = [{name: value.shape for name, value in weights.items()} for weights in (model, add, less)]
    if shapes[1] != shapes[2]:
        raise UserError("--add and --less are of two networks; expected one that was trained on; choose such")
    if any(shapes[0].get(name) != shape for name, shape in shapes[1].items()):
        raise UserError("the model is of another network than --add and --less; expected the same; choose such")
    return {
        name: value + share * (add[name] - less[name]) if name in add and value.is_floating_point() else value
        for name, value in model.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--add", type=Path, required=True)
    parser.add_argument("--less", type=Path, required=True)
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    try:
        merge(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def merge(args: argparse.Namespace) -> None:
    if not math.isfinite(args.share):
        raise UserError(f"share {args.share}; expected a finite number; correct --share")
    if args.out.exists():
        raise UserError(f"'{args.out}' is there already; expected a new folder; choose another --out")
    model = load(args.model)
    of = (load(run).network.state_dict() for run in (args.model, args.add, args.less))
    model.network.load_state_dict(merged(*of, args.share))

    def write(folder: Path) -> None:
        model.save(folder)
        said = {"model": str(args.model), "add": str(args.add), "less": str(args.less), "share": args.share}
        write_json(folder / "merged.json", said)

    write_folder(args.out, write)
    print(f"Made. Draw with: trigflow sample {args.out}")


if __name__ == "__main__":
    main()

"""A checkpoint, in whichever pieces it was written, as a model folder; and what there is to choose from."""

from pathlib import Path
from typing import Any

from trigflow.migrations import stamped
from trigflow.models.model import current_description, read_description
from trigflow.runtime.errors import UserError
from trigflow.runtime.files import read_json, write_folder, write_json, write_tensors
from trigflow.runtime.places import check_place
from trigflow.runtime.values import whole
from trigflow.training.checkpoint import check_checkpoint, list_checkpoints, open_checkpoint
from trigflow.training.config import read_config, to_dict


def describe_checkpoints(run: str | Path) -> str:
    """A line for each checkpoint of a run: iteration, size, files, and whether its files are what was written. Raises a
    UserError when the run has none."""
    lines = [f"{'iteration':>9}  {'MB':>9}  {'files':>5}  state"]
    for path in _checkpoints(Path(run)):
        try:
            sizes = [file.stat().st_size for file in path.glob("*.safetensors")]
            said = "sound" if check_checkpoint(path)["format"] > 1 else "readable; of a format without checksums"
        except (UserError, FileNotFoundError) as error:
            if not path.exists():  # the run goes on, and keeps newer ones
                continue
            said = f"damaged: {error}"
        lines.append(f"{int(path.name):9}  {sum(sizes) / 1e6:9.1f}  {len(sizes):5}  {said}")
    return "\n".join(lines)


def consolidate(run: str | Path, out: str | Path, *, at: int | None = None, everything: bool = False) -> Path:
    """Write the model of a checkpoint as a folder that `trigflow.load` reads: model.json, config.json, network.safetensors.

    Args:
        run: the run folder; training may go on in it.
        out: the folder to create.
        at: iteration of the checkpoint; by default the newest.
        everything: write `state.safetensors` too, with weights, averages and moments as whole tensors in a single file.

    Returns:
        The folder of the checkpoint.

    Raises:
        UserError: when there is no such checkpoint, it is damaged, or `out` exists or cannot be written.
    """
    run, out = Path(run), check_place(out, "new folder")
    if at is not None:
        whole(at=at)
    found = {int(path.name): path for path in _checkpoints(run)}
    if at is not None and at not in found:
        raise UserError(
            f"'{run}' has no checkpoint of iteration {at}; expected one of {', '.join(map(str, found))}; change --at"
        )
    path = found[max(found) if at is None else at]
    config = to_dict(read_config(run))
    with open_checkpoint(path) as stored:
        model = _description(run, path)

        def fill(folder: Path) -> None:
            write_tensors(folder / "network.safetensors", stored.read_all("ema"))
            write_json(folder / "config.json", stamped("config", config))
            if everything:
                write_tensors(folder / "state.safetensors", {name: stored.read(name) for name in stored.shapes})
            write_json(folder / "model.json", model)

        write_folder(out, fill)
    return path


def _checkpoints(run: Path) -> list[Path]:
    found = list_checkpoints(run)
    if not found:
        raise UserError(
            f"'{run}' has no checkpoints; expected a run folder written by trigflow train or distill; check the path"
        )
    return found


def _description(run: Path, path: Path) -> Any:
    """What a model.json says: kept with each checkpoint, or, where it is of the first format, with the run."""
    state = read_json(path / "state.json", "checkpoint")
    if "model" in state:
        config = read_json(run / "config.json", "configuration")
        return stamped("model", current_description(state["model"], f"the model in '{path / 'state.json'}'", config))
    for file in (run / "model.json", run / "ema" / "model.json"):
        if file.is_file():
            return stamped("model", read_description(file))
    raise UserError(
        f"checkpoint '{path}' is of an older format that does not describe its model; expected '{run / 'model.json'}' beside "
        "it; resume the run, which writes a new one"
    )

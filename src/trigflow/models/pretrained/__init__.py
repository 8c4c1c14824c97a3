"""Networks that others have trained, brought in safely: nothing in a file is run.

    from trigflow.models.pretrained import import_snapshot
    import_snapshot("edm2-img512-s-2147483-0.025.pkl", "runs/edm2-s")

`unpickle` reads a pickle as data, `records` knows what a network snapshot is made of, `nvidia` makes a configuration and a
list of weights of it, `write` a run folder.
"""

from trigflow.models.pretrained.nvidia import Snapshot, open_snapshot
from trigflow.models.pretrained.write import describe, import_snapshot

__all__ = ["Snapshot", "describe", "import_snapshot", "open_snapshot"]

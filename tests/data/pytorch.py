"""Writes state.pt and checkpoint.pt as torch.save does since PyTorch 1.6, without PyTorch.

    python3 tests/data/pytorch.py
"""

import collections
import io
import pathlib
import pickle
import struct
import sys
import types
import zipfile

FOLDER = pathlib.Path(__file__).resolve().parent

# The names by which a pickle of PyTorch's calls what it is made of.
torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
for name in ["FloatStorage", "BFloat16Storage", "LongStorage"]:
    setattr(torch, name, type(name, (), {"__module__": "torch"}))


def _rebuild_tensor_v2():
    pass


_rebuild_tensor_v2.__module__, _rebuild_tensor_v2.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
utils._rebuild_tensor_v2, torch._utils = _rebuild_tensor_v2, utils
sys.modules.update({"torch": torch, "torch._utils": utils})


class Storage:
    def __init__(self, kind, values):
        self.kind, self.count = getattr(torch, kind), len(values)
        if kind == "BFloat16Storage":
            self.data = b"".join(struct.pack("<f", x)[2:] for x in values)
        else:
            self.data = struct.pack(f"<{len(values)}{'f' if kind == 'FloatStorage' else 'q'}", *values)


class Tensor:
    def __init__(self, storage, offset, size, stride):
        self.arguments = (storage, offset, size, stride, False, collections.OrderedDict())

    def __reduce__(self):
        return (_rebuild_tensor_v2, self.arguments)


def save(path, value):
    storages, data = [], io.BytesIO()

    class Pickler(pickle.Pickler):
        def persistent_id(self, thing):
            if isinstance(thing, Storage):
                if thing not in storages:
                    storages.append(thing)
                return ("storage", thing.kind, str(storages.index(thing)), "cpu", thing.count)

    Pickler(data, protocol=2).dump(value)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        entries = {"data.pkl": data.getvalue(), "byteorder": b"little", "version": b"3\n"}
        entries.update({f"data/{index}": storage.data for index, storage in enumerate(storages)})
        for name, content in entries.items():
            # At a fixed time, so that the same file is written each time.
            file.writestr(zipfile.ZipInfo(f"{path.stem}/{name}", (1980, 1, 1, 0, 0, 0)), content)


whole = Storage("FloatStorage", [9.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
state = collections.OrderedDict(
    {
        # A transposed view behind an offset: 1 4, 2 5, 3 6.
        "layers.0.weight": Tensor(whole, 1, (3, 2), (1, 3)),
        "layers.0.bias": Tensor(Storage("BFloat16Storage", [0.0, -2.0]), 0, (2,), (1,)),
        "layers.1.num_batches_tracked": Tensor(Storage("LongStorage", [7]), 0, (), ()),
    }
)
save(FOLDER / "state.pt", state)
save(FOLDER / "checkpoint.pt", {"epoch": 3, "model": state, "optimizer": {"state": {0: {"exp_avg": state["layers.0.bias"]}}}})

"""What is packed comes back bit for bit, whatever it is; what is damaged or foreign is an error that says so."""

import itertools
import json
import os
import re
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from helpers import Net, fit
from torch import nn

from lightning_sap import FixedFraction, PruningCallback
from lightning_sap.deploy import load_sparse, quantize_survivors, save_sparse

safetensors = pytest.importorskip("safetensors")
NAMES = (
    "float64", "float32", "float16", "bfloat16", "complex64", "complex128", "complex32", "bool", "int64", "int32",
    "int16", "int8", "uint64", "uint32", "uint16", "uint8", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz",
    "float8_e5m2fnuz", "float8_e8m0fnu",
)  # fmt: skip
DTYPES = [getattr(torch, name) for name in NAMES if hasattr(torch, name)]
PAGE = Path(__file__).resolve().parents[2] / "docs" / "deploy.md"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "packed.safetensors"


def pruned(*shape, share=0.9, seed=0):
    """A weight of which a share is zero."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(*shape, generator=generator)
    return weight.masked_fill(torch.rand(*shape, generator=generator) < share, 0)


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else tensor.new_empty(0)


def assert_same(found, expected):
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(bits(found[name]), bits(tensor)), name


def random_bits(dtype, count, share):
    """Any bits, those of a share of the elements zero; of bools, bits that are bools."""
    raw = torch.randint(1, 2 if dtype == torch.bool else 256, (count, dtype.itemsize), dtype=torch.uint8)
    return (raw * (torch.rand(count, 1) > share)).reshape(-1).view(dtype)


@pytest.mark.filterwarnings("ignore:No tensor has zeros", "ignore:ComplexHalf support")
class TestBitExact:
    @pytest.mark.parametrize("compress", [True, False])
    @pytest.mark.parametrize("share", [0.0, 0.5, 0.95, 1.0])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_every_dtype_comes_back_bit_for_bit(self, path, dtype, share, compress):
        state = {"a": random_bits(dtype, 3 * 5 * 7, share).reshape(3, 5, 7), "b": random_bits(dtype, 3, share)}
        save_sparse(state, path, compress=compress)
        assert_same(load_sparse(path), state)

    @pytest.mark.parametrize("shape", [(), (0,), (0, 4), (4, 0, 2), (1,), (1, 1, 1), (7,), (64, 3)], ids=str)
    @pytest.mark.parametrize("value", [0.0, 1.5])
    def test_every_shape_comes_back(self, path, shape, value):
        state = {"x": torch.full(shape, value)}
        save_sparse(state, path)
        assert_same(load_sparse(path), state)

    def test_minus_zero_nan_and_infinity_are_kept(self, path):
        weight = torch.zeros(8, 8)
        weight[0, :4] = torch.tensor([-0.0, float("nan"), float("inf"), float("-inf")])
        save_sparse({"weight": weight}, path)
        assert_same(load_sparse(path), {"weight": weight})

    def test_strides_views_and_conjugates_are_resolved(self, path):
        base = pruned(6, 8)
        state = {"t": base.t(), "part": base[1:3, ::2], "row": base[0], "conj": torch.complex(base, base).conj()}
        save_sparse(state, path)
        assert_same(load_sparse(path), {**state, "conj": state["conj"].resolve_conj()})

    @pytest.mark.parametrize(
        "name", ["a.b.c.weight", "", ".", "wéight/ü 权", 'quo"te\\', "mask", "lightning_sap", "a\nb"]
    )
    def test_every_name_comes_back(self, path, name):
        state = {name: pruned(16, 16), f"{name}.values": pruned(16, 16, seed=1), f"{name}.mask": torch.ones(2)}
        save_sparse(state, path)
        assert_same(load_sparse(path), state)

    def test_an_empty_state_comes_back(self, path):
        save_sparse({}, path)
        assert load_sparse(path) == {}


class TestSmaller:
    def test_packed_size_is_values_and_a_bit_per_weight(self, path):
        save_sparse({"weight": pruned(500, 400, share=0.9)}, path, compress=False)
        kept = int((load_sparse(path)["weight"] != 0).sum())
        assert os.path.getsize(path) == pytest.approx(4 * kept + 500 * 400 / 8, abs=500)

    @pytest.mark.parametrize(("values", "most"), [("same", 0.11), ("float16", 0.07), ("int8", 0.04)])
    def test_compressed_size_at_ninety_percent(self, path, values, most):
        save_sparse({"weight": pruned(1000, 1000, share=0.9)}, path, values=values)
        assert os.path.getsize(path) < most * 4_000_000

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_zeros_of_both_signs_take_a_bit_each(self, path, dtype):
        weight = torch.randn(500, 400, dtype=dtype) * (torch.rand(500, 400) < 0.1)  # a product keeps the sign
        save_sparse({"weight": weight}, path, compress=False)
        assert_same(load_sparse(path), {"weight": weight})
        kept = int((weight != 0).sum())
        bytes_told = kept * dtype.itemsize + (2 * 200_000 - kept) / 8
        assert os.path.getsize(path) == pytest.approx(bytes_told, abs=500)

    def test_empty_rows_take_next_to_nothing(self, path):
        weight = torch.randn(1000, 1000)
        weight[100:] = 0
        save_sparse({"weight": weight}, path)
        assert os.path.getsize(path) < 0.092 * 4_000_000

    def test_tied_weights_are_stored_once_and_come_back_as_one(self, path):
        shared = torch.randn(64, 64)
        save_sparse({"in.weight": shared, "out.weight": shared, "pruned": pruned(8, 8)}, path)
        state = load_sparse(path)
        assert os.path.getsize(path) < 1.2 * 64 * 64 * 4
        assert state["in.weight"] is state["out.weight"]
        assert torch.equal(state["out.weight"], shared)

    def test_a_dense_state_is_warned_of(self, path):
        with pytest.warns(UserWarning, match="No tensor has zeros enough"):
            save_sparse({"weight": torch.ones(4, 4)}, path)


class TestFewerBits:
    def test_float16_rounds_the_survivors_and_nothing_else(self, path):
        state = {"w.weight": pruned(32, 32), "dense.weight": torch.randn(8, 8), "bias": torch.randn(8) * 0.1}
        state["bias"][:7] = 0
        save_sparse(state, path, values="float16")
        assert_same(load_sparse(path), {**state, "w.weight": state["w.weight"].half().float()})

    def test_int8_stores_what_quantize_survivors_gives(self, path):
        state = {"w.weight": pruned(32, 48), "dense.weight": torch.randn(8, 8), "bias": torch.randn(8)}
        save_sparse(state, path, values="int8")
        expected = {**state, "w.weight": quantize_survivors(state)["w.weight"]}
        assert_same(load_sparse(path), expected)
        save_sparse(expected, path, values="int8")
        assert_same(load_sparse(path), expected)

    def test_int8_of_a_module_scales_each_output_channel(self, path):
        module = nn.Sequential(nn.ConvTranspose2d(6, 4, 3), nn.Conv2d(4, 5, 3))
        with torch.no_grad():
            for part in module:
                part.weight.mul_(torch.rand_like(part.weight) > 0.8)
            module[0].weight[:, 0].mul_(1000)
        save_sparse(module, path, values="int8")
        assert_same(load_sparse(path), quantize_survivors(module).state_dict())

    def test_float16_refuses_what_it_cannot_hold(self, path):
        with pytest.raises(ValueError, match=r"a\.weight reaches 70000, and float16 only 65504"):
            save_sparse({"a.weight": torch.eye(8) * 7e4}, path, values="float16")
        assert not path.exists()

    def test_int8_refuses_what_is_not_finite(self, path):
        with pytest.raises(ValueError, match=r"a\.weight has weights that are not finite"):
            save_sparse({"a.weight": torch.diag(torch.tensor([1.0, float("nan")]).repeat(8))}, path, values="int8")

    def test_an_unknown_kind_of_values_is_refused(self, path):
        with pytest.raises(ValueError, match="values must be one of 'same', 'float16', 'int8', got 'int4'"):
            save_sparse({}, path, values="int4")


class TestSources:
    def test_a_module_loads_strictly(self, path):
        module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 8))
        with torch.no_grad():
            module[0].weight.mul_(torch.rand_like(module[0].weight) > 0.9)
        save_sparse(module, path)
        other = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 8))
        other.load_state_dict(load_sparse(path), strict=True)
        assert_same(other.state_dict(), module.state_dict())

    def test_a_checkpoint_as_dictionary_and_as_file_give_the_state_dict(self, path, tmp_path):
        model = Net()
        trainer = fit(model, PruningCallback(FixedFraction(0.5)))
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        for source in (tmp_path / "last.ckpt", torch.load(tmp_path / "last.ckpt", weights_only=True)):
            save_sparse(source, path)
            assert_same(load_sparse(path), OrderedDict(model.state_dict()))

    @pytest.mark.filterwarnings("ignore:No tensor has zeros")
    @pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
    def test_a_file_of_torch_save_is_read(self, path, tmp_path, legacy):
        base = pruned(6, 8)
        state = {
            "a": base,
            "tied": base,
            "t": base.t(),
            "part": base[1:3, ::2],
            "0-d": torch.tensor(3),
            "none": base[:0],
        }
        torch.save(state, tmp_path / "state.pt", _use_new_zipfile_serialization=not legacy)
        save_sparse(tmp_path / "state.pt", path)
        found = load_sparse(path)
        assert_same(found, state)
        assert found["tied"] is found["a"]

    def test_a_safetensors_file_and_a_packed_one_are_read(self, path, tmp_path):
        from safetensors.torch import save_file

        state = {"b.weight": pruned(16, 16).bfloat16(), "a": torch.arange(3), "flag": torch.tensor([True] * 3)}
        save_file(state, tmp_path / "plain.safetensors", metadata={"format": "pt"})
        save_sparse(tmp_path / "plain.safetensors", path)
        save_sparse(path, path)
        found = load_sparse(path)
        assert_same({name: found[name] for name in state}, state)

    @pytest.mark.parametrize(
        ("source", "reason"),
        [
            ({"a": torch.ones(2), "_extra_state": 3}, "holds a int at '_extra_state'"),
            ({"a": torch.ones(2).to_sparse()}, "'a' is a Tensor on cpu of layout torch.sparse_coo"),
            ({"a": torch.ones(2, device="meta")}, "'a' is a Tensor on meta"),
            ([torch.ones(2)], "A module, a state_dict or a path is taken, got list"),
        ],
    )
    def test_what_is_no_dense_tensor_is_refused(self, path, source, reason):
        with pytest.raises(TypeError, match=re.escape(reason)):
            save_sparse(source, path)

    def test_a_tensor_with_the_name_of_the_texts_is_refused(self, path):
        with pytest.raises(ValueError, match="cannot be named '__metadata__'"):
            save_sparse({"__metadata__": torch.ones(2)}, path)


class TestWholeOrNotAtAll:
    def test_a_failing_write_leaves_the_old_file_and_no_other(self, path, monkeypatch):
        save_sparse({"weight": pruned(32, 32)}, path)
        before = path.read_bytes()
        monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("no space left")))
        with pytest.raises(OSError, match="no space left"):
            save_sparse({"weight": pruned(32, 32, seed=1)}, path)
        assert path.read_bytes() == before
        assert os.listdir(path.parent) == [path.name]

    def test_a_source_that_fails_half_way_leaves_the_old_file(self, path):
        save_sparse({"weight": pruned(32, 32)}, path)
        before = path.read_bytes()
        bad = {"weight": pruned(32, 32, seed=1), "z.weight": torch.diag(torch.full((8,), float("inf")))}
        with pytest.raises(ValueError, match=r"z\.weight"):
            save_sparse(bad, path, values="int8")
        assert path.read_bytes() == before
        assert os.listdir(path.parent) == [path.name]

    def test_a_missing_folder_is_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"nowhere of a\.safetensors does not exist"):
            save_sparse({"weight": pruned(8, 8)}, tmp_path / "nowhere" / "a.safetensors")

    def test_a_link_stays_a_link(self, path):
        link = path.with_name("link")
        path.write_bytes(b"")
        link.symlink_to(path)
        save_sparse({"weight": pruned(32, 32)}, link)
        assert link.is_symlink()
        assert list(load_sparse(path)) == ["weight"]


class TestDamage:
    @pytest.fixture
    def whole(self, path):
        state = {"a.weight": pruned(8, 12, share=0.5), "dense": torch.arange(5.0), "n": torch.tensor(3)}
        state["tied"] = state["dense"]
        save_sparse(state, path)
        return path.read_bytes()

    def test_every_cut_is_an_error(self, path, whole):
        for length in range(len(whole)):
            path.write_bytes(whole[:length])
            with pytest.raises(ValueError, match=r"cut off|not a safetensors|not a file of save_sparse|damaged"):
                load_sparse(path)

    def test_every_flipped_bit_is_an_error_or_harmless(self, path, whole):
        path.write_bytes(whole)
        expected = load_sparse(path)
        silent = 0
        for place, bit in itertools.product(range(len(whole)), (0, 3, 6)):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            try:
                assert_same(load_sparse(path), expected)
                silent += 1
            except ValueError as error:
                assert str(path) in str(error)  # noqa: PT017  # which bits are harmless is not known beforehand
        assert silent < 50

    def test_bytes_behind_the_end_are_an_error(self, path, whole):
        path.write_bytes(whole + b"\0\0")
        with pytest.raises(ValueError, match="2 bytes after its last tensor belong to nothing"):
            load_sparse(path)

    def test_damaged_values_are_named(self, path, whole):
        at = len(whole) - 1
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]))
        with pytest.raises(ValueError, match=r"the bytes of 'a\.weight' are not those that were written"):
            load_sparse(path)

    def test_a_newer_version_is_told(self, path, monkeypatch):
        monkeypatch.setattr("lightning_sap.deploy.reading.VERSION", 2)
        save_sparse({"weight": pruned(8, 8)}, path)
        monkeypatch.undo()
        with pytest.raises(ValueError, match="is of version 2, this reads 1; update lightning-sap"):
            load_sparse(path)

    def test_foreign_files_are_told(self, path):
        from safetensors.torch import save_file

        save_file({"a": torch.ones(2)}, path)
        with pytest.raises(ValueError, match=r"not a file of save_sparse; read it with safetensors\.torch\.load_file"):
            load_sparse(path)
        for content in (b"", b"PK\x03\x04" + bytes(99), b"hello world, this is text", bytes(999)):
            path.write_bytes(content)
            with pytest.raises(ValueError, match="not a file of save_sparse"):
                load_sparse(path)
        with pytest.raises(FileNotFoundError):
            load_sparse(path.with_name("none"))


class TestFormat:
    def test_the_safetensors_library_reads_the_file(self, path):
        state = {"w.weight": pruned(16, 16), "odd": torch.tensor([True] * 3), "dense": torch.randn(3).double()}
        save_sparse(state, path)
        with safetensors.safe_open(path, "pt") as file:
            assert set(file.keys()) == set(state)
            assert torch.equal(file.get_tensor("dense"), state["dense"])
            assert torch.equal(file.get_tensor("odd"), state["odd"])
            index = json.loads(file.metadata()["lightning_sap"])
        assert index["version"] == 1
        assert index["tensors"]["w.weight"]["shape"] == [16, 16]

    @pytest.mark.filterwarnings("ignore:ComplexHalf support")
    @pytest.mark.parametrize("compress", [True, False])
    @pytest.mark.parametrize("values", ["same", "float16", "int8"])
    def test_twenty_lines_of_the_docs_read_the_file(self, path, values, compress):
        block = re.search(r"```python\n(import json.*?)```", PAGE.read_text(), re.DOTALL)[1]
        assert "lightning_sap.deploy" not in block
        assert sum(bool(line.strip()) for line in block.splitlines()) <= 25
        names = {}
        exec(block, names)
        state = {str(dtype): random_bits(dtype, 60, 0.8).reshape(6, 10) for dtype in DTYPES}
        state |= {
            "a.weight": pruned(16, 24),
            "b.weight": pruned(16, 8).bfloat16(),
            "c.weight": pruned(4, 8, 3).double(),
        }
        state |= {"none": torch.ones(0, 3), "0-d": torch.tensor(4), "zero": torch.tensor(0.0)}
        state["tied.weight"] = state["a.weight"]
        save_sparse(state, path, values=values, compress=compress)
        assert_same(names["read"](path), load_sparse(path))

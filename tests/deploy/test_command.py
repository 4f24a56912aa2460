"""The command line: what it says of each kind of file, what it writes, what it refuses, and in how much memory."""

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import Net, fit
from torch import nn

from lightning_sap import FixedFraction, PruningCallback, __version__, gini_index, pq_index, prune_count
from lightning_sap.__main__ import main
from lightning_sap.deploy import load_sparse, save_sparse

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def look(capsys):
    """What `inspect --json` prints of a file."""

    def call(file, *options):
        assert main(["inspect", str(file), "--json", *options]) == 0
        return json.loads(capsys.readouterr().out)

    return call


def state():
    return {
        "0.weight": torch.tensor([[0.0, 0.0, 3.0, 1.0], [0.0, -1.0, 2.0, 5.0]]),
        "0.bias": torch.tensor([0.0, 2.0]),
        "steps": torch.tensor(7),
    }


def assert_right(found, tensors):
    """Rows as the functional API has them."""
    assert [row["name"] for row in found["tensors"]] == list(tensors)
    for row, (name, x) in zip(found["tensors"], tensors.items(), strict=True):
        assert row["shape"] == list(x.shape), name
        assert row["zeros"] == int((x == 0).sum()), name
        if x.is_floating_point():
            kept = x != 0
            assert row["pqi"] == pytest.approx(float(pq_index(x, mask=kept)), abs=1e-12)
            assert row["gini"] == pytest.approx(float(gini_index(x, mask=kept)), abs=1e-6)
        if "weight" in name and x.dim() > 1:
            assert row["would_prune"] == int(prune_count(row["pqi"], int(kept.sum()), 0.5, 1.0))
        else:
            assert row["would_prune"] is None


class TestInspect:
    def test_numbers_of_a_small_state_dict_by_hand(self, look, tmp_path):
        torch.save(state(), tmp_path / "state.pt")
        found = look(tmp_path / "state.pt")
        assert_right(found, state())
        weight = found["tensors"][0]
        assert (weight["weights"], weight["zeros"], weight["dtype"]) == (8, 3, "float32")
        # survivors 1, 1, 2, 3, 5 sum to 12: (-4 - 2 + 0 + 6 + 20) / (5 * 12)
        assert weight["gini"] == pytest.approx(20 / 60)
        assert found["total"]["weights"] == 11
        assert found["total"]["zeros"] == 4
        assert (found["total"]["prunable"], found["total"]["prunable_zeros"]) == (8, 3)
        assert found["total"]["pqi"] == weight["pqi"]
        assert found["total"]["would_prune"] == {"layer": weight["would_prune"], "global": weight["would_prune"]}

    def test_options_of_sap_are_used(self, look, tmp_path):
        torch.save(state(), tmp_path / "state.pt")
        found = look(tmp_path / "state.pt", "--p", "1", "--q", "2", "--eta-r", "0.5", "--gamma", "0.5", "--beta", "0.5")
        weight = state()["0.weight"]
        index = pq_index(weight, 1, 2, mask=weight != 0)
        assert found["tensors"][0]["pqi"] == pytest.approx(float(index))
        expected = int(prune_count(index, 5, 1, 2, eta_r=0.5, gamma=0.5, beta=0.5))
        assert found["tensors"][0]["would_prune"] == expected
        assert (found["p"], found["eta_r"]) == (1, 0.5)

    @pytest.mark.parametrize(
        "callbacks", [[PruningCallback(FixedFraction(0.5))], []], ids=["pruned", "plain Lightning"]
    )
    def test_a_checkpoint_of_lightning(self, look, tmp_path, callbacks):
        model = Net()
        trainer = fit(model, *callbacks)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        assert_right(look(tmp_path / "last.ckpt"), model.state_dict())

    def test_a_state_dict_of_torchvision(self, look, tmp_path):
        torchvision = pytest.importorskip("torchvision")
        model = torchvision.models.resnet18()
        torch.save(model.state_dict(), tmp_path / "resnet.pth")
        found = look(tmp_path / "resnet.pth")
        assert_right(found, model.state_dict())
        assert found["total"]["prunable"] == sum(p.numel() for p in model.parameters() if p.dim() > 1)

    def test_plain_and_packed_safetensors(self, look, tmp_path):
        safetensors = pytest.importorskip("safetensors.torch")
        tensors = dict(
            sorted(
                {**state(), "half.weight": torch.randn(4, 4).half(), "b.weight": torch.randn(2, 2).bfloat16()}.items()
            )
        )
        safetensors.save_file(tensors, tmp_path / "plain.safetensors")
        plain = look(tmp_path / "plain.safetensors")
        assert sorted(row["name"] for row in plain["tensors"]) == list(tensors)
        assert_right(plain, {row["name"]: tensors[row["name"]] for row in plain["tensors"]})
        tensors["0.weight"] = torch.eye(32)
        save_sparse(tensors, tmp_path / "packed.safetensors")
        assert_right(look(tmp_path / "packed.safetensors"), tensors)

    def test_a_tied_weight_counts_once(self, look, tmp_path):
        weight = torch.randn(4, 4)
        torch.save({"in.weight": weight, "out.weight": weight}, tmp_path / "tied.pt")
        found = look(tmp_path / "tied.pt")
        assert [row["tied_to"] for row in found["tensors"]] == [None, "in.weight"]
        assert found["total"]["weights"] == 16

    def test_what_is_not_finite_and_other_dtypes(self, look, tmp_path):
        tensors = {
            "nan.weight": torch.tensor([[float("nan"), 1.0]]), "c": torch.ones(2, 2, dtype=torch.complex64),
            "f8.weight": torch.ones(2, 2).to(torch.float8_e4m3fn), "none.weight": torch.ones(0, 3),
        }  # fmt: skip
        torch.save(tensors, tmp_path / "odd.pt")
        rows = {row["name"]: row for row in look(tmp_path / "odd.pt")["tensors"]}
        assert (rows["nan.weight"]["pqi"], rows["nan.weight"]["would_prune"]) == (None, None)
        assert rows["c"]["pqi"] is None
        assert (rows["f8.weight"]["pqi"], rows["f8.weight"]["would_prune"]) == (0.0, 0)
        assert (rows["none.weight"]["weights"], rows["none.weight"]["pqi"]) == (0, 0.0)

    def test_the_table(self, tmp_path, capsys):
        torch.save(state(), tmp_path / "state.pt")
        assert main(["inspect", str(tmp_path / "state.pt")]) == 0
        out = capsys.readouterr().out
        assert "0.weight  2x4     float32  37.5%" in out
        assert "3 tensors, 11 weights, 36.4% zeros" in out
        assert "SAP (p=0.5, q=1, eta_r=0, gamma=1, beta=0.9) would prune" in out


class Bomb:
    """Unpickling this would leave a file behind."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


class TestRefused:
    @pytest.mark.parametrize("command", ["inspect", "pack"])
    @pytest.mark.parametrize("kind", ["zip", "legacy", "pickle", "checkpoint"])
    def test_a_pickle_that_runs_code_is_refused_unexecuted(self, tmp_path, capsys, command, kind):
        bomb, file = Bomb(tmp_path / "executed"), tmp_path / "bomb.pt"
        if kind == "pickle":
            file.write_bytes(pickle.dumps(bomb))
        else:
            content = {"state_dict": {"w": torch.ones(2)}, "extra": bomb} if kind == "checkpoint" else bomb
            torch.save(content, file, _use_new_zipfile_serialization=kind != "legacy")
        assert main([command, str(file)]) == 1
        assert "is refused: it is no file of weights alone" in capsys.readouterr().err
        assert sorted(path.name for path in tmp_path.iterdir()) == ["bomb.pt"]

    def test_a_whole_module_is_refused_with_the_cure(self, tmp_path, capsys):
        torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
        assert main(["inspect", str(tmp_path / "module.pt")]) == 1
        assert "Save model.state_dict()" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b"", "is damaged, or holds no weights"),
            (b"plain text, and some more of it", "is refused|is damaged"),
            (b"PK\x03\x04 and no archive", "is cut off or damaged"),
            ((10**6).to_bytes(8, "little") + b"{}", "is cut off: its header has 1,000,000 bytes"),
        ],
    )
    def test_what_is_no_file_of_weights(self, tmp_path, capsys, content, reason):
        file = tmp_path / "file"
        file.write_bytes(content)
        assert main(["inspect", str(file)]) == 1
        err = capsys.readouterr().err
        assert any(part in err for part in reason.split("|")), err

    def test_every_cut_of_a_checkpoint_is_an_error(self, tmp_path, capsys):
        torch.save(state(), tmp_path / "whole.pt")
        whole = (tmp_path / "whole.pt").read_bytes()
        for length in range(0, len(whole), 41):
            (tmp_path / "cut.pt").write_bytes(whole[:length])
            assert main(["inspect", str(tmp_path / "cut.pt")]) == 1
            assert "cut.pt is" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            ([1, 2], "holds a list, not a state_dict"),
            ({"epoch": 3, "loss": 0.5}, "has no state_dict: it holds epoch, loss"),
            ({"w": torch.ones(2), "note": "x"}, "holds a str at 'note'"),
        ],
    )
    def test_what_is_no_state_dict(self, tmp_path, capsys, content, reason):
        torch.save(content, tmp_path / "file.pt")
        assert main(["inspect", str(tmp_path / "file.pt")]) == 1
        assert reason in capsys.readouterr().err

    def test_a_missing_file_and_an_unknown_command(self, tmp_path, capsys):
        assert main(["inspect", str(tmp_path / "none.pt")]) == 1
        assert "none.pt" in capsys.readouterr().err
        with pytest.raises(SystemExit, match="2"):
            main(["shrink", "x"])


class TestPackAndUnpack:
    @pytest.fixture
    def file(self, tmp_path):
        weight = torch.randn(64, 64).masked_fill(torch.rand(64, 64) < 0.9, 0)
        torch.save({"state_dict": {"a.weight": weight, "b": torch.arange(3)}}, tmp_path / "last.ckpt")
        return tmp_path / "last.ckpt"

    def test_pack_then_unpack_gives_the_weights_again(self, file, capsys):
        expected = torch.load(file, weights_only=True)["state_dict"]
        assert main(["pack", str(file)]) == 0
        packed = file.with_name("last.sparse.safetensors")
        assert f"{packed}: {packed.stat().st_size:,} bytes for 16,408 bytes of weights" in capsys.readouterr().out
        assert torch.equal(load_sparse(packed)["a.weight"], expected["a.weight"])
        assert main(["unpack", str(packed)]) == 0
        assert main(["unpack", str(packed), str(file.with_name("dense.pt"))]) == 0
        safetensors = pytest.importorskip("safetensors.torch")
        plain = safetensors.load_file(file.with_name("last.dense.safetensors"))
        pt = torch.load(file.with_name("dense.pt"), weights_only=True)
        for name, tensor in expected.items():
            assert torch.equal(plain[name], tensor)
            assert torch.equal(pt[name], tensor)

    def test_options_of_pack(self, file):
        sizes = []
        for options in ([], ["--no-compress"], ["--values", "int8"]):
            assert main(["pack", str(file), "--force", *options]) == 0
            sizes.append(file.with_name("last.sparse.safetensors").stat().st_size)
        assert sizes[2] < sizes[0] < sizes[1]

    def test_a_file_that_is_there_is_kept_without_force(self, file, capsys):
        out = file.with_name("out.safetensors")
        out.write_text("mine")
        assert main(["pack", str(file), str(out)]) == 1
        assert "exists already; name another file, or give --force" in capsys.readouterr().err
        assert out.read_text() == "mine"

    def test_unpack_refuses_what_is_not_packed(self, file, capsys):
        assert main(["unpack", str(file)]) == 1
        assert "is not a file of save_sparse" in capsys.readouterr().err

    def test_packing_dense_weights_says_so(self, tmp_path, capsys):
        torch.save({"weight": torch.ones(4, 4)}, tmp_path / "dense.pt")
        assert main(["pack", str(tmp_path / "dense.pt")]) == 0
        assert "No tensor has zeros enough" in capsys.readouterr().err


MEASURED = """
import os, re, sys
from pathlib import Path
from lightning_sap.__main__ import main

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

for command in sys.argv[1:]:
    if os.fork() == 0:  # each command in a process of its own, without importing all anew
        Path("/proc/self/clear_refs").write_text("5")  # else the peak is that of the process that began this one
        start = peak()
        code = main(command.split())
        print("grown", peak() - start, command, file=sys.stderr, flush=True)
        os._exit(code)
    assert os.wait()[1] == 0
"""


@pytest.mark.slow
@pytest.mark.linux
@pytest.mark.skipif(torch.__version__ < "2.7", reason="PyTorch 2.6 maps the file, whose pages count as memory")
def test_a_large_file_is_read_in_the_memory_of_a_few_tensors(tmp_path):
    weight = torch.randn(1 << 21).masked_fill(torch.rand(1 << 21) < 0.5, 0).reshape(2048, -1)  # 8 MiB
    torch.save({f"{i}.weight": weight.clone() for i in range(30)}, tmp_path / "large.pt")  # 240 MiB
    commands = (
        "inspect large.pt",
        "pack large.pt packed.safetensors",
        "inspect packed.safetensors",
        "unpack packed.safetensors dense.safetensors",
        "pack dense.safetensors --no-compress",
    )
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *commands],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    grown = {command: int(kib) for kib, command in re.findall(r"grown (\d+) (.*)", done.stderr)}
    assert set(grown) == set(commands)
    assert max(grown.values()) < 160 * 1024, grown


@pytest.mark.slow
def test_a_reader_that_has_seen_enough_is_no_error(tmp_path):
    torch.save({f"{i}.weight": torch.randn(2, 2) for i in range(3000)}, tmp_path / "many.pt")  # more than a pipe holds
    inspect = subprocess.Popen(
        [sys.executable, "-m", "lightning_sap", "inspect", "many.pt"], env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert inspect.stdout.readline().split()[0] == "tensor"
    inspect.stdout.close()
    assert (inspect.stderr.read(), inspect.wait()) == ("", 0)
    inspect.stderr.close()


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"lightning-sap {__version__}\n"


def test_the_module_runs_as_a_program(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "lightning_sap", "--help"], env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert "inspect|pack|unpack" in done.stdout

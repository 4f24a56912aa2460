"""Files of rounds that are not what was saved: told before anything is touched; the next sound one is put back."""

import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from archiving import archived, snapshot, unchanged
from helpers import Watch, same
from stopping import holds, monitor_of, run

pytestmark = pytest.mark.slow  # whole fits, many of them


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A run with three rounds: module, pruner, its rounds, the Trainer; and the bytes of its second round."""
    found = archived(tmp_path_factory.mktemp("kept"))
    return found, Path(found[1].history[1].path).read_bytes()


def refused(kept, data, message):
    """Whether the round with these bytes is refused, and nothing is changed by that."""
    (module, pruner, rounds, _), sound = kept
    path = Path(pruner.history[1].path)
    before = snapshot(module, pruner)
    path.write_bytes(data)
    try:
        with pytest.raises(ValueError, match=message):
            pruner.restore_round(1)
        assert unchanged(before, module, pruner)
    finally:
        path.write_bytes(sound)
    pruner.restore_round(1)
    assert same(module.state_dict(), rounds.states[1])
    pruner.restore_round(2)


class TestRefusals:
    @pytest.mark.parametrize("share", range(20))
    def test_truncated_round_is_refused(self, kept, share):
        _, sound = kept
        end = len(sound) * share // 20
        refused(kept, sound[:end], re.escape(f"has {end:,} bytes of {len(sound):,}."))

    @pytest.mark.parametrize("share", range(20))
    def test_round_with_a_flipped_bit_is_refused(self, kept, share):
        _, sound = kept
        at = len(sound) * share // 20
        flipped = sound[:at] + bytes([sound[at] ^ 1 << share % 8]) + sound[at + 1 :]
        refused(kept, flipped, "Round 1 is damaged: .* has not the SHA-256 that it was saved with")

    def test_other_round_in_its_place_is_refused(self, kept):
        (_, pruner, _, _), _ = kept
        refused(kept, Path(pruner.history[2].path).read_bytes(), "Round 1 is damaged")

    def test_round_of_another_run_in_its_place_is_refused(self, kept, tmp_path):
        refused(kept, Path(archived(tmp_path)[1].history[1].path).read_bytes(), "Round 1 is damaged")

    def test_foreign_file_in_its_place_is_refused(self, kept):
        refused(kept, b"PK\x03\x04 no checkpoint", "Round 1 is damaged")

    def test_other_round_is_told_by_its_identity_too(self, kept, tmp_path):
        """Where a record of an older version has no digest."""
        module, pruner, _, _trainer = archived(tmp_path)
        shutil.copy(pruner.history[2].path, pruner.history[1].path)
        pruner.history.note(1, size=None, sha256=None)
        before = snapshot(module, pruner)
        with pytest.raises(ValueError, match=r"is not round 1 of this run, but of another \(Identity\(.*round=2\)\)"):
            pruner.restore_round(1)
        assert unchanged(before, module, pruner)

    @pytest.mark.parametrize("what", ["weights are gone", "no state", "no callbacks", "a list"])
    def test_incomplete_round_with_no_digest_is_refused(self, tmp_path, what):
        module, pruner, _, _trainer = archived(tmp_path)
        path = pruner.history[1].path
        checkpoint = torch.load(path, weights_only=True)
        if what == "weights are gone":
            del checkpoint["state_dict"]["net.0.weight"]
        elif what == "no state":
            checkpoint["callbacks"].clear()
        else:
            checkpoint = {"state_dict": checkpoint["state_dict"]} if what == "no callbacks" else [1]
        torch.save(checkpoint, path)
        pruner.history.note(1, size=None, sha256=None)
        before = snapshot(module, pruner)
        with pytest.raises(ValueError, match=r"it lacks \['net\.0\.weight'\]|Round 1 cannot be read"):
            pruner.restore_round(1)
        assert unchanged(before, module, pruner)

    def test_record_has_size_and_digest_of_its_file(self, kept):
        import hashlib

        (_, pruner, _, _), _ = kept
        for record in pruner.history:
            data = Path(record.path).read_bytes()
            assert (record.size, record.sha256) == (len(data), hashlib.sha256(data).hexdigest())


def damage(path, how):
    data = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(
            {"empty": b"", "truncated": data[:-99], "foreign": b"thesis"}.get(how, data[:-9] + b"x" + data[-8:])
        )


class TestVerdicts:
    @pytest.mark.parametrize("how", ["gone", "empty", "truncated", "foreign", "flipped"])
    def test_stop_restores_the_next_sound_round_where_one_is_damaged(self, tmp_path, how, capsys):
        """The verdict is round 3; the report is written all the same."""
        spoil = Watch(on_train_end=lambda t, m: damage(tmp_path / "rounds" / "sap-round-003.ckpt", how))
        with pytest.warns(UserWarning, match=r"sap: .*sap-round-003\.ckpt.* Round 2 is put back instead\."):
            found = run(tmp_path, spoil, monitor=monitor_of(verbose=True))
        assert found.monitor.verdict.restore == 3
        assert holds(found, 2)
        assert found.pruner.history.restored.round == 2
        assert "The module holds round 2 again" in found.monitor.report()
        assert "The module holds round 2 again" in capsys.readouterr().out

    def test_stop_leaves_the_module_where_all_rounds_are_damaged(self, tmp_path):
        def spoil(trainer, module):
            for path in (tmp_path / "rounds").iterdir():
                damage(path, "truncated")

        with pytest.warns(UserWarning, match=r"sap: the module stays as it is after round 5\. Round 3 is damaged"):
            found = run(tmp_path, Watch(on_train_end=spoil))
        assert holds(found, 5)
        assert "The module holds round 5" in found.monitor.report()

    def test_stop_passes_over_rounds_that_were_not_saved(self, tmp_path):
        spoil = Watch(
            on_train_end=lambda t, m: [os.unlink(tmp_path / "rounds" / f"sap-round-00{i}.ckpt") for i in (3, 2)]
        )
        with pytest.warns(UserWarning, match=r"Round 1 is put back instead\."):
            found = run(tmp_path, spoil)
        assert holds(found, 1)

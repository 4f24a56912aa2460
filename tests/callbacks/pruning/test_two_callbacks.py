"""Two pruning callbacks in one Trainer."""

from helpers import Net, Watch, fit, half, survivors

from lightning_sap import SAPCallback


class TestTwoCallbacks:
    def test_two_callbacks_prune_their_own_parts(self):
        a = half(name="a", include="net.0.*")
        b = SAPCallback(name="b", include="net.3.*", target_remaining=0.25, rounds=1, scope="neuron")
        module, seen = Net(), []
        keys = ("a/remaining", "b/remaining", "a/round", "b/round")
        look = Watch(on_train_epoch_end=lambda t, m: seen.append([float(t.callback_metrics[k]) for k in keys]))
        fit(module, a, b, look)
        assert survivors(a) == {"net.0.weight": 6}
        assert survivors(b) == {"net.3.weight": 6}
        assert seen == [[1, 1, 0, 0], [0.5, 1, 1, 0], [0.25, 0.25, 2, 1], [0.125, 0.25, 3, 1]]

    def test_two_callbacks_of_one_class_go_by_two_names(self):
        a, b = half(name="a", include="net.0.*"), half(name="b", exclude="net.0.*", every_n_epochs=2)
        fit(Net(), a, b)
        assert (survivors(a), survivors(b)) == ({"net.0.weight": 6}, {"net.3.weight": 12})

"""The module stays the user's: its state dict has the keys of the dense model, and nothing is planted in it."""

from helpers import BATCHES, Net, Watch, copied, fit, half, same


class TestStateDict:
    def test_state_dict_has_the_dense_keys_before_during_and_after(self):
        dense, seen = Net(), []
        watch = Watch(
            on_fit_start=lambda trainer, module: seen.append(copied(module.state_dict())),
            on_train_batch_end=lambda trainer, module: seen.append(copied(module.state_dict())),
        )
        module = Net()
        seen.append(copied(module.state_dict()))
        fit(module, half(rewind_weights="init"), watch)
        seen.append(copied(module.state_dict()))
        assert len(seen) == 3 + 4 * BATCHES
        for state in seen:
            assert list(state) == list(dense.state_dict())
            dense.load_state_dict(state, strict=True)
            assert same(dense.state_dict(), state)

    def test_nothing_is_planted_in_the_module(self):
        def anatomy(module):
            return {
                name: (sorted(vars(m)), sorted(m._parameters), sorted(m._buffers), len(m._forward_hooks),
                       len(m._forward_pre_hooks), type(m))
                for name, m in module.net.named_modules()
            }  # fmt: skip

        module, during = Net(), []
        before = anatomy(module)
        ids = [id(parameter) for parameter in module.parameters()]
        fit(module, half(rewind_weights="init"), Watch(on_train_batch_end=lambda t, m: during.append(anatomy(m))))
        assert [*during, anatomy(module)] == [before] * (4 * BATCHES + 1)
        assert [id(parameter) for parameter in module.parameters()] == ids
        assert not any(parameter._backward_hooks for parameter in module.parameters())
        assert all(parameter.is_leaf for parameter in module.parameters())

"""`check_moe` and `moe_checks`: every check, as one report or one by one under pytest."""

# they register themselves, in this order
from moesaic.testing import function_checks, replay_checks, loss_checks, numeric_checks  # noqa: F401, I001
from moesaic.testing import scale_checks, bias_checks, system_checks, parallel_checks  # noqa: F401
from moesaic.testing.harness import CHECKS, Check, Factory, try_out
from moesaic.testing.report import Report

__all__ = ["check_moe", "moe_checks"]


def moe_checks() -> list[Check]:
    """The checks, for pytest:

        @pytest.mark.parametrize("check", moe_checks(), ids=str)
        def test_my_layer(check):
            check(my_factory)

    A failed check raises AssertionError; one that does not apply skips, with the reason.
    """
    return list(CHECKS)


def check_moe(factory: Factory) -> Report:
    """Run every check on the layer that `factory` makes, a fresh one for each.

    Args:
        factory: returns an `nn.Module` that maps x (B, L, D) to y (B, L, D), or to a tuple that starts with y; or a
            `MoEUnderTest`, which says more about the layer. `moesaic.layers.MoE` and Hugging Face's Llama 4, Mixtral,
            Qwen3-MoE and DeepSeek-V3 blocks need no description. If it takes `num_experts`, it is called with 1 for
            the single-expert check. Your own module is copied, never changed.

    Returns:
        A `Report`; a check whose needs the layer does not meet is "not applicable", with the reason.

    Raises:
        InputError: if the factory raises, makes something else, or makes a module that does not map (B, L, D) to
            itself.
    """
    layer = try_out(factory)
    return Report(type(layer.module).__name__, tuple(check.run(factory) for check in CHECKS))

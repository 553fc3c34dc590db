"""Every file of quantization/methods, by itself: equal scales and weights at 1 to 4 ranks, and across a resume.

The micro-batches of a step are 5, or for two methods 3 larger ones: ranks accumulate, and some have none in the last
round. One layer is reached by some of the micro-batches only, so that some ranks never see data of it in a step.
"""

from __future__ import annotations

import pkgutil
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # also in the workers of the pool
from quantized_training import STEPS, made  # noqa: E402

from dist_compress.fingerprint import weights_fingerprint  # noqa: E402
from dist_compress.quantization import Quantizer, methods  # noqa: E402
from dist_compress.quantization.config_list import fake_quantize_class  # noqa: E402
from dist_compress.quantization.setting import Setting  # noqa: E402
from dist_compress.training.calibration import calibrate  # noqa: E402
from dist_compress.training.loop import Trainer  # noqa: E402

METHODS = sorted(module.name for module in pkgutil.iter_modules(methods.__path__))
OPTIONS = {"dorefa": {"gradient_bits": 4}}


def marks(trainer: Trainer, quantizer: Quantizer) -> list[str]:
    return [quantizer.fingerprint(), weights_fingerprint(trainer.model)]


def run(method: str, micro: int) -> tuple[list[list[str]], dict[str, float], list[int]]:
    """(fingerprints of scales and weights after calibration and after each step, loss, micro-batches that the seldom
    layer saw)."""
    trainer, quantizer = made(micro, method=method, options=OPTIONS.get(method, {}))
    seen: list[int] = []
    trainer.model.seldom.register_forward_pre_hook(lambda *_: seen.append(1))
    for listener, _ in quantizer.rounds():
        calibrate(trainer, listener, 3)
    quantizer.begin()
    trainer.settle()
    found = [marks(trainer, quantizer)]
    seen.clear()
    for step in range(STEPS if next(iter(quantizer.parameters.values())).trains else 0):
        trainer.train(until=step + 1)
        trainer.settle()
        found.append(marks(trainer, quantizer))
    passes = len(seen)
    quantizer.measure(*trainer.data.example(4))
    loss = trainer.evaluate()
    quantizer.fold()
    assert not [n for n, _ in trainer.model.named_parameters() if "quantizer" in n]  # nothing is left to learn
    assert abs(trainer.evaluate()["loss"] - loss["loss"]) < 1e-3  # folded, it is the same model
    return found, loss, [passes]


@pytest.mark.parametrize("method", METHODS)
def test_scales_and_weights_are_the_same_at_any_number_of_ranks(ranks, method):
    for micro in (8, 12) if method in ("qat", "lsq_plus") else (8,):
        found, loss, passes = ranks(1, run, method, micro)[0]
        trained = len(found) > 1
        assert len({weights for _, weights in found}) == (STEPS + 1 if trained else 1)
        if trained:
            assert 0 < passes[0] < STEPS * (5 if micro == 8 else 3)  # it is seldom, indeed
        for size in (2, 3, 4) if micro == 8 else (2,):
            for other in ranks(size, run, method, micro):
                assert other[:2] == (found, loss), f"{size} ranks"


def stopped(method: str) -> dict[str, Any]:
    trainer, quantizer = made(method=method, options=OPTIONS.get(method, {}))
    for listener, _ in quantizer.rounds():
        calibrate(trainer, listener, 3)
    quantizer.begin()
    trainer.train(until=2)
    trainer.settle()
    return trainer.state()


def resumed(method: str, state: dict[str, Any]) -> list[str]:
    trainer, quantizer = made(method=method, options=OPTIONS.get(method, {}))
    trainer.load_state(state)
    trainer.train(until=STEPS)
    trainer.settle()
    return marks(trainer, quantizer)


TRAINED = [m for m in METHODS if fake_quantize_class(Setting("", "", method=m)).trains]


@pytest.mark.parametrize("method", TRAINED)
def test_a_stopped_training_goes_on_at_another_number_of_ranks(ranks, method):
    whole = ranks(1, run, method, 8)[0][0][-1]
    state = ranks(3, stopped, method)[0]
    assert ranks(2, resumed, method, state) == [whole, whole]

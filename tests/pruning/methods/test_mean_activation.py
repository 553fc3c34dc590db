"""Mean of outputs behind a ReLU, against a float64 run of the same net that keeps all it needs."""

from pruning_nets import check_heard


def test_what_a_micro_batch_adds():
    check_heard("mean_activation", lambda output, grad: output.clamp(min=0).mean((0, 2, 3)))

"""Share of outputs that are positive, against a float64 run of the same net that keeps all it needs."""

from pruning_nets import check_heard


def test_what_a_micro_batch_adds():
    check_heard("apoz", lambda output, grad: (output > 0).double().mean((0, 2, 3)))

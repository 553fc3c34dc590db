"""Squares of the gradients of shared gates, sample by sample, against a float64 run that keeps all it needs."""

from pruning_nets import check_heard


def test_what_a_micro_batch_adds():
    check_heard("group_fisher", lambda output, grad: (output * grad).sum((2, 3)).square().sum(0))

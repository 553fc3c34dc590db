"""How a mask acts on an activation, one file for each `apply_method`.

A file holds a dataclass `Options` (`apply_options`) and

    apply(x, mask, options) -> tensor like x

where `mask` is 1 for what is kept and 0 for what is not, of x's dtype, and broadcasts to x. It runs in every forward
pass, so tensor operations are all it should use. A file of one's own is named by its dotted path.
"""

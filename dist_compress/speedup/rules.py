"""Which rule an ATen op follows, by name. An op that is in no list and not tagged pointwise is a barrier."""

from __future__ import annotations

import functools

import torch
from torch._ops import OpOverload

from dist_compress.speedup import (
    bilinear,
    contraction,
    custom,
    dimwise,
    elementwise,
    indexing,
    movement,
    named,
    norms,
    overlay,
    weight_norm,
)
from dist_compress.speedup.probe import Probed
from dist_compress.speedup.rule import Rule
from dist_compress.tracing import ModuleCall, Op
from dist_compress.tracing.tape import Overlay, aten_name

_NAMES: dict[Rule, str] = {
    elementwise.Pointwise(): "add sub clone _to_copy to contiguous detach alias lift_fresh lift_fresh_copy "
    "dropout native_dropout hardswish hardsigmoid hardtanh leaky_relu prelu _prelu_kernel gelu elu silu mish "
    "relu relu6 sigmoid tanh softplus log_sigmoid_forward nan_to_num floor_divide pow polar complex "
    "resolve_conj resolve_neg _conj _neg_view",
    elementwise.Choice(): "masked_fill where",
    elementwise.New(): "new_zeros new_ones new_full new_empty zeros ones full empty",
    elementwise.Restride(): "as_strided",
    Rule(): "as_strided_scatter",
    elementwise.Product(): "mul",
    elementwise.Quotient(): "div",
    elementwise.Copy(): "copy",
    elementwise.Fill(): "fill zero zeros_like ones_like full_like empty_like rand_like randn_like",
    movement.View(): "view _unsafe_view reshape _reshape_alias",
    movement.Move(): "permute transpose t numpy_T unsqueeze squeeze expand select slice split split_with_sizes "
    "unsafe_split unsafe_split_with_sizes unsafe_chunk unbind flip repeat diagonal narrow unfold movedim "
    "pixel_shuffle pixel_unshuffle",
    movement.Index(indexing.AdvancedIndex()): "index",
    movement.Index(indexing.IndexSelect()): "index_select",
    movement.Roll(): "roll",
    movement.Shuffle(): "native_channel_shuffle channel_shuffle",
    movement.Pad(): "constant_pad_nd",
    movement.Cat(): "cat",
    movement.Stack(): "stack",
    contraction.Matmul(): "mm bmm addmm baddbmm",
    contraction.Convolution(): "convolution",
    dimwise.BatchNorm(): "native_batch_norm cudnn_batch_norm miopen_batch_norm _native_batch_norm_legit_no_training",
    dimwise.GroupNorm(): "native_group_norm",
    dimwise.LayerNorm(): "native_layer_norm _fused_rms_norm rms_norm",
    dimwise.Softmax(): "_softmax _log_softmax _safe_softmax cumsum cumprod logcumsumexp glu",
    dimwise.Sum(): "sum linalg_vector_norm any",
    dimwise.Reduction(): "mean amax amin max min argmax argmin var std var_mean std_mean prod all logsumexp "
    "norm topk sort argsort kthvalue median nanmedian mode aminmax cummax cummin count_nonzero nansum",
    dimwise.Window(): "max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d "
    "_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d mkldnn_max_pool2d "
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact2d upsample_bilinear2d "
    "upsample_bicubic2d upsample_linear1d upsample_trilinear3d reflection_pad1d reflection_pad2d replication_pad1d "
    "replication_pad2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa",
    dimwise.Embedding(): "embedding",
    weight_norm.WeightNorm(): " ".join(weight_norm.NAMES),
    bilinear.Fixed(): " ".join(bilinear.Fixed.table),
    bilinear.GroupedMatmul(): "_grouped_mm",
    bilinear.Trilinear(): "_trilinear",
    bilinear.DeformableConvolution(): "deform_conv2d",
    indexing.Gather(): "gather",
    indexing.Scatter(): "scatter scatter_add scatter_reduce",
    indexing.IndexAdd(): "index_add index_copy index_fill index_reduce",
    indexing.AdvancedIndex(): "index_put _index_put_impl _unsafe_index_put",
    indexing.MaskedScatter(): "masked_scatter",
    named.Transform(): "_fft_r2c _fft_c2c _fft_c2r",
    named.Triangle(): "tril triu",
    named.ComplexView(): "view_as_real view_as_complex",
    named.Sample(): "grid_sampler_2d grid_sampler_3d",
    named.Regions(): "roi_align roi_pool",
    named.EmbeddingBag(): "_embedding_bag _embedding_bag_forward_only",
    named.Distance(): "_cdist_forward",
    named.Unfold(): "im2col col2im",
    Rule(): "as_strided_scatter",
}
_RULES = {name: rule for rule, names in _NAMES.items() for name in names.split()}
_POINTWISE, _WRITE, _BARRIER, _UNKNOWN = elementwise.Pointwise(), overlay.Write(), Rule(), Probed()


def rule_of(op: Op) -> Rule:
    """The rule of an op; ops over two tensors that share a name with a reduction (max, min) are pointwise."""
    own = custom.rule_for(op)
    if own is not None:
        return own
    if isinstance(op.target, ModuleCall):
        formula = norms.formula_of(op.target.module)
        return _BARRIER if formula is None else norms.NormModule(formula)
    return _WRITE if isinstance(op.target, Overlay) else _rule_of_aten(op.target)


@functools.cache
def _rule_of_aten(target: OpOverload) -> Rule:
    name, overload = aten_name(target), target._overloadname
    if name in ("max", "min") and overload == "other":
        return _POINTWISE
    if name == "view" and overload == "dtype":
        return _BARRIER
    if name in _RULES:
        return _RULES[name]
    return _POINTWISE if torch.Tag.pointwise in target.tags else _UNKNOWN

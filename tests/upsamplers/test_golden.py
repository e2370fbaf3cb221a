"""Features of shipped weights are what they were where one regression covers the image."""

import pytest
import torch

from upfeat.upsamplers import create_upsampler

# Sum, sum of squares and two values of a whole map in float64; they change with the weights alone.
EXPECTED = {
    "detail_efficientnet_lite0": (16531.558471518, 1069646.752994708, 0.091605437, 1.390341003),
    "detail_universal": (1327.84649733, 807933.798074038, -0.284442924, 0.318209444),
    "neighbourhood_universal": (719.938984628, 739035.351990605, -0.168882428, 0.213360703),
    "joint_bilateral": (627.798262673, 206513.505325816, -0.064776495, 0.437363012),
}


def _wave(*shape):
    count = torch.Size(shape).numel()
    return torch.sin(0.37 * torch.arange(count, dtype=torch.float64) ** 1.13).view(shape)


@pytest.mark.parametrize("name", EXPECTED)
def test_features_are_what_they_were(name):
    features, guidance = _wave(1, 112, 7, 9), _wave(1, 3, 109, 141)
    with torch.no_grad():
        out = create_upsampler(name).double()(features, guidance)
        single = create_upsampler(name)(features.float(), guidance.float())
    found = (out.sum(), out.square().sum(), out[0, 3, 50, 60], out[0, 100, 108, 0])
    for one, expected in zip(found, EXPECTED[name], strict=True):
        assert float(one) == pytest.approx(expected, rel=1e-8, abs=1e-8)
    # Cells of this guidance hardly differ, so that rounding of the queries is raised with them.
    torch.testing.assert_close(single.double(), out, rtol=0, atol=8e-5 * float(out.abs().max()))

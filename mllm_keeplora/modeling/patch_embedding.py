"""A patch embedding that is given single patches, as Qwen's are, as the one product that it is."""

from torch import Tensor, nn
from torch.nn.functional import linear


class SinglePatchConv3d(nn.Conv3d):
    """A Conv3d whose inputs have its kernel's size: nothing slides, so that weight and input are multiplied once.

    A convolution of as many inputs as there are patches takes 3 times as long on a CPU (docs/log.md).
    """

    def forward(self, input: Tensor) -> Tensor:
        """[patches, in, *kernel] -> [patches, out, 1, 1, 1]; inputs of other sizes are convolved."""
        if input.shape[2:] != self.kernel_size:
            return super().forward(input)
        return linear(input.flatten(1), self.weight.flatten(1), self.bias)[:, :, None, None, None]


def embed_patches_by_one_product(model: nn.Module) -> None:
    """Has every Conv3d that neither pads nor groups do so; weights, names and saved files stay.

    Side effects:
        Changes the modules' class.
    """
    for module in model.modules():
        if type(module) is nn.Conv3d and module.groups == 1 and not any(module.padding) and set(module.dilation) == {1}:
            module.__class__ = SinglePatchConv3d

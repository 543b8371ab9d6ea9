"""An adapter's update with fewer directions, and what that costs."""

import torch
from torch import Tensor


@torch.no_grad()
def truncate_factors(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The product of rank `rank` that is closest to B A in the Frobenius norm (Eckart and Young).

    The SVD of B A is taken through QR of the factors, so no matrix of the layer's size is formed: with
    B = Q_B R_B and A^T = Q_A R_A it is that of R_B R_A^T, [r, r]. Singular values are split evenly between the two.

    Args:
        a: A, [r, in].
        b: B, [out, r].
        rank: directions to keep.

    Returns:
        (A [k, in], B [out, k]), fp32 on the factors' device, k = min(rank, r, in, out).
    """
    left, r_b = torch.linalg.qr(b.double())
    right, r_a = torch.linalg.qr(a.double().T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    kept = s[:rank].sqrt()
    return (kept[:, None] * (vh[:rank] @ right.T)).float(), (left @ u[:, :rank] * kept).float()


@torch.no_grad()
def product_difference(exact: tuple[Tensor, Tensor], approximate: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """||B' A' - B A||_F and ||B A||_F, in fp64, without forming a product.

    Args:
        exact: (A [r, in], B [out, r]).
        approximate: (A' [r', in], B' [out, r']), of any floating type.
    """
    (a, b), (a_2, b_2) = ((x.double(), y.double()) for x, y in (exact, approximate))
    r = torch.linalg.qr(torch.cat([b, -b_2], dim=1)).R
    difference = r @ torch.cat([a, a_2.to(a.device)])
    return float(difference.norm()), float((torch.linalg.qr(b).R @ a).norm())

"""Cards that a layout can name, with the figures of their vendor's data sheets."""

from dataclasses import dataclass


_GIB = 2.0**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One device. Bytes, and bytes or operations a second; bandwidths are of one direction."""

    name: str
    memory: float
    flops: float
    """Dense products in bf16 with sums in float32: the data sheet's number without its factor of 2 for sparsity."""
    memory_bandwidth: float
    link: float
    """Of a card to the others of its node: NVLink, or PCIe without it. Data sheets name the sum of both directions."""
    network: float
    """Of a whole node to the others."""
    max_sequences: int = 1024
    """How many completions vLLM runs at a time if nobody says otherwise (`max_num_seqs`)."""


CARDS = {
    card.name: card
    for card in (
        Card(
            name="4090",
            memory=24 * _GIB,
            flops=165.2e12,
            memory_bandwidth=1008e9,
            link=32e9,
            network=1.25e9,
            max_sequences=256,
        ),
        Card(
            name="A100",
            memory=80 * _GIB,
            flops=312e12,
            memory_bandwidth=2039e9,
            link=300e9,
            network=200e9,
            max_sequences=256,
        ),
        Card(name="H100", memory=80 * _GIB, flops=989e12, memory_bandwidth=3350e9, link=450e9, network=400e9),
        Card(name="H200", memory=140 * _GIB, flops=989e12, memory_bandwidth=4800e9, link=450e9, network=400e9),
    )
}
"""By name. NVIDIA's data sheets: RTX 4090 (Ada architecture, appendix A; PCIe 4.0 x16), A100 80GB SXM, H100 SXM, H200
SXM. The network is that of the vendor's own node of eight: DGX A100 with 8 x 200 Gb/s, DGX H100 and H200 with 8 x 400
Gb/s. For the 4090 no vendor names one: 10 Gb/s are assumed."""

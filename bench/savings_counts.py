"""What the savings of docs/savings.md can give at best: counted from sizes, measured by nobody.

Times are work over ceilings. A matrix product is counted in waves: its output is cut into tiles, each multiprocessor
computes one at a time, and a last wave that is not full takes as long as a full one. So is attention.
"""

from __future__ import annotations

from dataclasses import dataclass

from echo_rt.config import ModelConfig

# Rows and columns of an output tile that a multiprocessor of an H200 computes at the full rate.
_TILES = ((128, 256), (256, 128))
_ATTENTION_ROWS = 128  # queries of one head to a block of threads
_ELEMENT = 2  # bytes, of the 16-bit types
# Of a layer, behind its self-attention and the product that leads to it.
REST_PRODUCTS = ("self_out", "cross_q", "cross_out", "ffn_in", "ffn_out")
PRODUCTS = ("qkv", *REST_PRODUCTS)


@dataclass(frozen=True)
class Limits:
    """A GPU: floating-point operations and bytes (read + written) a second, and how many multiprocessors it has."""

    flops: float
    bytes: float
    multiprocessors: int


# The ceilings of docs/kernels.md.
H200 = Limits(flops=790e12, bytes=4.3e12, multiprocessors=132)


@dataclass(frozen=True)
class Count:
    """Milliseconds a block, without the saving and with it."""

    now: float
    then: float

    @property
    def saved(self) -> float:
        return self.now - self.then


class Counts:
    """Those of a model on a GPU."""

    def __init__(self, config: ModelConfig, limits: Limits) -> None:
        self._config, self._limits = config, limits
        self._tokens, self._dim = config.tokens_per_block, config.transformer.dim
        self._layers = config.transformer.num_layers
        self.keys = config.cached_tokens

    @property
    def passes(self) -> int:
        """Of a block: the denoising steps and the context pass."""
        return len(self._config.sampler.denoising_steps) + 1

    @property
    def attentions(self) -> int:
        """Of a block, over the cache and over the text alike; the last layer of the context pass has none."""
        return self.passes * self._layers - 1

    def merged_layers(self, product: str) -> int:
        """Layers in which both halves of a merged pass need ``product``: the context pass ends early in the last."""
        return self._layers if product == "qkv" else self._layers - 1

    def shape(self, product: str) -> tuple[int, int]:
        """Columns and inner size of one of :data:`PRODUCTS`."""
        dim, wide = self._dim, self._config.transformer.ffn_dim
        return {"qkv": (3 * dim, dim), "ffn_in": (wide, dim), "ffn_out": (dim, wide)}.get(product, (dim, dim))

    @property
    def transformer(self) -> float:
        """Milliseconds of a block's products and attention, with nothing lost and nothing saved."""
        each = self._tokens * self._token_flops() + self._attention_flops(self.keys)
        each += self._attention_flops(self._config.transformer.text_len)
        return self._milliseconds(self.passes * self._layers * each)

    # ---------------------------------------------------------------- a merged context and first pass

    def merged_product(self, product: str) -> Count:
        """In all layers: over a block's tokens twice, or over twice the tokens."""
        layers = self.merged_layers(product)
        apart, together = (self._product(rows, product) for rows in (self._tokens, 2 * self._tokens))
        return Count(2 * layers * apart, layers * together)

    def wasted(self, product: str) -> float:
        """Milliseconds a block that the two products apart lose to waves that are not full."""
        columns, inner = self.shape(product)
        full = self._milliseconds(2 * 2 * self._tokens * columns * inner)
        return self.merged_product(product).now - self.merged_layers(product) * full

    def merged_cross_attention(self) -> Count:
        """In all layers but the last: attention to the text, for which both halves have the same keys."""
        text = self._config.transformer.text_len
        apart, together = (self._attention_waves(rows, text) for rows in (self._tokens, 2 * self._tokens))
        return Count((self._layers - 1) * 2 * apart, (self._layers - 1) * together)

    def merged_rest(self) -> Count:
        """Norms move the same bytes either way. GELU is part of a product."""
        row = self._tokens * self._dim * _ELEMENT
        moved = 2 * (self._layers - 1) * (3 * 4 * row + 2 * row)
        milliseconds = 1e3 * moved / self._limits.bytes
        return Count(milliseconds, milliseconds)

    # ---------------------------------------------------------------- padding collapsed to one key

    def collapsed(self, real: int, *, merged_outside: bool) -> Count:
        """Attention to ``real`` keys and one that stands for all padding, in place of the whole text.

        With ``merged_outside`` the kernel attends to the real keys alone, and another pass over its output adds the
        one: queries and output are read, the output is written.
        """
        now = self._attention(self._config.transformer.text_len)
        then = self._attention(real if merged_outside else real + 1)
        if merged_outside:
            then += 1e3 * 3 * self._tokens * self._dim * _ELEMENT / self._limits.bytes
        return Count(self.attentions * now, self.attentions * then)

    # ---------------------------------------------------------------- a context pass that ends early

    def cut_short(self) -> Count:
        """What the last layer of the context pass would do behind its keys and values; its head is left out."""
        rest = [
            self._milliseconds(2 * self._tokens * columns * inner) for columns, inner in map(self.shape, REST_PRODUCTS)
        ]
        text = self._config.transformer.text_len
        return Count(sum(rest) + self._milliseconds(self._attention_flops(self.keys)) + self._attention(text), 0.0)

    # ---------------------------------------------------------------- attention in pieces

    def in_pieces(self, pieces: int) -> Count:
        """Attention over the cache, in ``pieces`` of the keys: more tiles, and copies of the queries and merging."""
        row = self._tokens * self._dim * _ELEMENT
        copied, merged = (1 + pieces) * row, (pieces + 1) * row
        now = self._attention_waves(self._tokens, self.keys)
        then = self._attention_waves(self._tokens, self.keys, pieces) + 1e3 * (copied + merged) / self._limits.bytes
        return Count(self.attentions * now, self.attentions * then)

    # ---------------------------------------------------------------- parts

    def _milliseconds(self, flops: float) -> float:
        return 1e3 * flops / self._limits.flops

    def _token_flops(self) -> int:
        return sum(2 * columns * inner for columns, inner in map(self.shape, PRODUCTS))

    def _attention_flops(self, keys: int) -> int:
        return 4 * self._tokens * keys * self._dim

    def _attention(self, keys: int) -> float:
        """Milliseconds of one call over a block's queries: arithmetic, or the bytes of q, k, v and the output."""
        moved = 2 * (self._tokens + keys) * self._dim * _ELEMENT
        return max(self._milliseconds(self._attention_flops(keys)), 1e3 * moved / self._limits.bytes)

    def _waves(self, tiles: int, flops_of_a_tile: int) -> float:
        waves = -(-tiles // self._limits.multiprocessors)
        return self._milliseconds(waves * self._limits.multiprocessors * flops_of_a_tile)

    def _product(self, rows: int, product: str) -> float:
        columns, inner = self.shape(product)
        return min(
            self._waves(-(-rows // high) * -(-columns // wide), 2 * high * wide * inner) for high, wide in _TILES
        )

    def _attention_waves(self, rows: int, keys: int, pieces: int = 1) -> float:
        """Milliseconds of one call: a tile for each head, each piece of the keys and some of the queries."""
        transformer = self._config.transformer
        tiles = -(-rows // _ATTENTION_ROWS) * transformer.num_heads * pieces
        return self._waves(tiles, 4 * _ATTENTION_ROWS * keys // pieces * transformer.head_dim)

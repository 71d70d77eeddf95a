"""How few parameters LoRA trains in public models: by arithmetic from their published shapes."""

from dataclasses import dataclass

from fastlora.tables import Table

PAPERS_RANK, ALL_RANK = 4, 16  # the paper's, on Wq and Wv; a usual one, on every projection


@dataclass(frozen=True)
class PublicModel:
    """A decoder by its published configuration.

    Attributes:
        hidden: width of the residual stream, and of all queries together.
        key_value: width of all keys together.
        gated: whether the feed-forward layer has a gate beside its two matrices.
        tied: whether one matrix embeds tokens and puts out logits.
    """

    name: str
    layers: int
    hidden: int
    key_value: int
    intermediate: int
    vocabulary: int
    gated: bool = True
    tied: bool = False

    @property
    def parameters(self) -> int:
        """Of all matrices; norms, biases and position embeddings, below a thousandth, are left out."""
        attention = 2 * self.hidden * (self.hidden + self.key_value)
        feed_forward = (2 + self.gated) * self.hidden * self.intermediate
        return self.layers * (attention + feed_forward) + (2 - self.tied) * self.vocabulary * self.hidden

    def trained_on_q_and_v(self, rank: int) -> int:
        """A and B of Wq and Wv."""
        return self.layers * rank * (3 * self.hidden + self.key_value)

    def trained_on_all(self, rank: int) -> int:
        """A and B of every projection."""
        attention = 2 * (2 * self.hidden) + 2 * (self.hidden + self.key_value)
        feed_forward = (2 + self.gated) * (self.hidden + self.intermediate)
        return self.layers * rank * (attention + feed_forward)


MODELS = (
    PublicModel("SmolLM2-135M", 30, 576, 192, 1536, 49152, tied=True),
    PublicModel("Llama-3.1-8B", 32, 4096, 1024, 14336, 128256),
    PublicModel("Llama-3.1-70B", 80, 8192, 1024, 28672, 128256),
    PublicModel("GPT-3 175B", 96, 12288, 12288, 49152, 50257, gated=False, tied=True),
)


def shares_table() -> Table:
    """A row a model: parameters, and which part of them LoRA trains."""
    rows = []
    for model in MODELS:
        trained = model.trained_on_q_and_v(PAPERS_RANK), model.trained_on_all(ALL_RANK)
        shares = [text for count in trained for text in (f"{count:,}", f"1 in {model.parameters / count:,.0f}")]
        rows.append([model.name, f"{model.parameters / 1e9:.3g} billion", *shares])
    columns = ["model", "parameters", f"r = {PAPERS_RANK} on Wq, Wv", "share", f"r = {ALL_RANK} on all", "share"]
    note = "By arithmetic from published shapes. The paper's case is the last one, r = 4."
    return Table("Trained parameters of public models", note, columns, rows)

"""Recurrent networks: torch's layers and cells in all their variants, and others in loops."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

from bench.architectures.case import Architecture
from bench.architectures.tables import (
    Composed,
    architectures_of,
    batches,
    below,
    fixed,
    normal,
    uniform,
    weight,
)


class Sequences(nn.Module):
    """A recurrent layer over vectors, and a linear readout of every step."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer
        width = (layer.proj_size or layer.hidden_size) * (2 if layer.bidirectional else 1)
        self.out = nn.Linear(width, 3)

    def forward(self, x: Tensor, state: object = None) -> tuple[Tensor, object]:
        """Returns the readout and the last state."""
        hidden, state = self.layer(x, state)
        return self.out(hidden), state


class Packed(nn.Module):
    """Token sequences of different lengths, packed for the recurrent layer."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.embedding, self.layer = nn.Embedding(11, 5, padding_idx=0), layer
        self.out = nn.Linear(layer.hidden_size * (2 if layer.bidirectional else 1), 3)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Reads out the padded sequences."""
        x = self.embedding(tokens)
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        hidden, _ = self.layer(packed)
        return self.out(pad_packed_sequence(hidden, batch_first=True, total_length=6)[0])


class CellLoop(nn.Module):
    """A cell in a Python loop, with dropout on its state."""

    def __init__(self, cell: nn.RNNCellBase) -> None:
        super().__init__()
        self.cell, self.drop, self.out = cell, nn.Dropout(0.2), nn.Linear(cell.hidden_size, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Reads out each step."""
        state, outputs = None, []
        for step in x.unbind(0):
            state = self.cell(step, state)
            hidden = state[0] if isinstance(state, tuple) else state
            outputs.append(self.out(self.drop(hidden)))
        return torch.stack(outputs)


class Seq2Seq(nn.Module):
    """Encoder and decoder with additive attention (Bahdanau et al. 2014)."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(11, width), nn.Embedding(13, width)
        self.encoder = nn.GRU(width, width, batch_first=True, bidirectional=True)
        self.cell = nn.GRUCell(3 * width, width)
        self.key, self.query = nn.Linear(2 * width, width), nn.Linear(width, width)
        self.score, self.out = nn.Linear(width, 1), nn.Linear(3 * width, 13)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Teacher forcing: scores for each next token."""
        memory, last = self.encoder(self.source(source))
        keys, state, scores = self.key(memory), last[0], []
        for token in self.target(target).unbind(1):
            energies = self.score(torch.tanh(keys + self.query(state)[:, None]))
            context = (energies.softmax(1) * memory).sum(1)
            state = self.cell(torch.cat([token, context], 1), state)
            scores.append(self.out(torch.cat([state, context], 1)))
        return torch.stack(scores, 1)


class ConvLSTM(nn.Module):
    """LSTM whose products are convolutions (Shi et al. 2015)."""

    def __init__(self, inputs: int = 2, width: int = 4) -> None:
        super().__init__()
        self.width, self.gates = width, nn.Conv2d(inputs + width, 4 * width, 3, padding=1)

    def forward(self, frames: Tensor) -> Tensor:
        """The hidden state after the last frame."""
        batch, _, _, *size = frames.shape
        hidden = cell = frames.new_zeros(batch, self.width, *size)
        for frame in frames.unbind(1):
            i, f, g, o = self.gates(torch.cat([frame, hidden], 1)).chunk(4, 1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            hidden = o.sigmoid() * cell.tanh()
        return hidden


class LockedDropoutLSTM(nn.Module):
    """LSTM layers with one dropout mask for all steps (Merity et al. 2017), weights tied."""

    def __init__(self, tokens: int = 11, width: int = 6) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.layers = nn.ModuleList(nn.LSTM(width, width) for _ in range(2))
        self.out = nn.Linear(width, tokens)
        self.out.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores for each next token."""
        x = self.embedding(tokens)
        for layer in self.layers:
            keep = x.new_empty(1, x.shape[1], x.shape[2]).bernoulli_(0.8) / 0.8
            x, _ = layer(x * keep)
        return self.out(x)


class ChainCRF(nn.Module):
    """Bidirectional LSTM with a linear-chain CRF (Huang et al. 2015); returns the loss."""

    def __init__(self, tags: int = 4) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(11, 5), nn.Linear(12, tags)
        self.layer = nn.LSTM(5, 6, bidirectional=True)
        self.transitions = nn.Parameter(0.1 * torch.randn(tags, tags))

    def forward(self, tokens: Tensor, tags: Tensor) -> Tensor:
        """Negative log-likelihood of the tags, by the forward algorithm."""
        emissions = self.out(self.layer(self.embedding(tokens))[0])
        score = emissions.gather(2, tags[..., None]).sum((0, 2))
        score = score + self.transitions[tags[:-1], tags[1:]].sum(0)
        alpha = emissions[0]
        for emission in emissions[1:]:
            alpha = (alpha[:, :, None] + self.transitions).logsumexp(1) + emission
        return (alpha.logsumexp(1) - score).mean()


class IndRNN(nn.Module):
    """Each unit sees only its own past (Li et al. 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.input, self.recurrent = nn.Linear(5, 7), nn.Parameter(torch.rand(7))

    def forward(self, x: Tensor) -> Tensor:
        """All hidden states."""
        drive, hidden, states = self.input(x), x.new_zeros(x.shape[1], 7), []
        for step in drive:
            hidden = F.relu(step + self.recurrent * hidden)
            states.append(hidden)
        return torch.stack(states)


class TreeLSTM(nn.Module):
    """Child-sum LSTM over a nested tuple of leaf numbers (Tai et al. 2015)."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.leaf, self.gates = nn.Linear(3, 2 * width), nn.Linear(width, 3 * width)
        self.forget = nn.Linear(width, width)

    def forward(self, leaves: Tensor, tree: object) -> Tensor:
        """The hidden state at the root."""
        return self._node(leaves, tree)[0]

    def _node(self, leaves: Tensor, tree: object) -> tuple[Tensor, Tensor]:
        if isinstance(tree, int):
            hidden, cell = self.leaf(leaves[:, tree]).chunk(2, 1)
            return hidden.tanh(), cell
        children = [self._node(leaves, child) for child in tree]
        i, o, u = self.gates(sum(hidden for hidden, _ in children)).chunk(3, 1)
        kept = sum(self.forget(hidden).sigmoid() * cell for hidden, cell in children)
        cell = i.sigmoid() * u.tanh() + kept
        return o.sigmoid() * cell.tanh(), cell


def _scan(m: nn.Module, x: Tensor) -> Tensor:
    """Minimal gated recurrence, in parallel by cumulative sums of logarithms."""
    gate, value = m.proj(x).chunk(2, -1)
    log_keep = F.logsigmoid(-gate).cumsum(0)
    return ((gate.sigmoid() * value) * (-log_keep).exp()).cumsum(0) * log_keep.exp()


def _echo(m: nn.Module, x: Tensor) -> Tensor:
    """Echo state: the reservoir is a buffer, the readout learns."""
    state, states = x.new_zeros(x.shape[1], 9), []
    for step in x:
        state = torch.tanh(step @ m.into + state @ m.reservoir)
        states.append(state)
    return m.out(torch.stack(states))


def _ragged(m: nn.Module, sequences: list[Tensor]) -> Tensor:
    """A list of sequences of different lengths."""
    return m.out(m.layer(pack_sequence(sequences, enforce_sorted=False))[0].data)


_X = batches(normal(6, 2, 5))
_X_FIRST = batches(normal(2, 6, 5, grad=True))
_TOKENS = batches(below(11, 6, 2))
_LENGTHS = below(7, 2, low=2)
_PACKED = batches(below(11, 2, 6), lambda g: torch.cat([_LENGTHS(g), torch.tensor([6])])[-2:])


def all_of() -> list[Architecture]:
    """The recurrent networks of the zoo."""
    return architectures_of(
        "recurrent",
        ("rnn tanh", lambda: Sequences(nn.RNN(5, 7)), _X),
        ("rnn relu deep", lambda: Sequences(nn.RNN(5, 7, 3, "relu", dropout=0.2)), _X),
        ("rnn without bias", lambda: Sequences(nn.RNN(5, 7, bias=False)), _X),
        ("gru", lambda: Sequences(nn.GRU(5, 7)), _X),
        (
            "gru bidirectional",
            lambda: Sequences(nn.GRU(5, 7, 2, batch_first=True, dropout=0.3, bidirectional=True)),
            _X_FIRST,
        ),
        ("gru unbatched", lambda: Sequences(nn.GRU(5, 7)), batches(normal(6, 5), normal(1, 7))),
        ("lstm deep", lambda: Sequences(nn.LSTM(5, 7, 3, dropout=0.2)), _X),
        ("lstm bidirectional", lambda: Sequences(nn.LSTM(5, 7, bidirectional=True)), _X),
        (
            "lstm projected",
            lambda: Sequences(nn.LSTM(5, 7, 2, proj_size=4)).double(),
            batches(normal(6, 2, 5, dtype=torch.float64)),
        ),
        (
            "lstm with given state",
            lambda: Sequences(nn.LSTM(5, 7)),
            batches(normal(6, 2, 5), lambda g: (normal(1, 2, 7)(g), normal(1, 2, 7, grad=True)(g))),
        ),
        ("rnn packed", lambda: Packed(nn.RNN(5, 6, batch_first=True)), _PACKED),
        ("gru packed", lambda: Packed(nn.GRU(5, 6, batch_first=True)), _PACKED),
        (
            "lstm packed bidirectional",
            lambda: Packed(nn.LSTM(5, 6, 2, batch_first=True, dropout=0.2, bidirectional=True)),
            _PACKED,
        ),
        (
            "gru ragged list",
            lambda: Composed(_ragged, layer=nn.GRU(5, 6), out=nn.Linear(6, 2)),
            batches(lambda g: [normal(n, 5)(g) for n in (2, 4, 3)]),
        ),
        ("rnn cell loop", lambda: CellLoop(nn.RNNCell(5, 7)), _X),
        ("gru cell loop", lambda: CellLoop(nn.GRUCell(5, 7)), _X),
        ("lstm cell loop", lambda: CellLoop(nn.LSTMCell(5, 7)), _X),
        ("seq2seq attention", Seq2Seq, batches(below(11, 2, 5), below(13, 2, 4))),
        ("conv lstm", ConvLSTM, batches(normal(2, 3, 2, 6, 6))),
        ("locked dropout lstm", LockedDropoutLSTM, _TOKENS),
        ("chain crf", ChainCRF, batches(below(11, 6, 2), below(4, 6, 2))),
        ("independent rnn", IndRNN, _X),
        ("tree lstm", TreeLSTM, batches(normal(2, 4, 3), fixed(((0, 1), (2, 3))))),
        ("minimal gru scan", lambda: Composed(_scan, proj=nn.Linear(5, 8)), _X),
        (
            "echo state",
            lambda: Composed(
                _echo,
                into=weight(5, 9).detach(),
                reservoir=weight(9, 9).detach(),
                out=nn.Linear(9, 2),
            ),
            batches(uniform(6, 2, 5)),
        ),
    )

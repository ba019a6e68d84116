//! One backend's compute buffer: what it sets aside for a tensor, and which bytes of it are free (`ggml_dyn_tallocr` with one chunk).

use super::ops::Graph;
use super::tensor::{Op, TensorId};

/// No tensor takes more, so that sums over graphs stay far from overflow.
const LARGEST: i64 = 1 << 44;

/// How a backend's buffers count bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BufferRules {
    /// Every allocation is padded to this many bytes, a power of two.
    pub(super) alignment: i64,
    /// CUDA pads a quantised tensor's last row to 512 elements and keeps f16 copies of K and V behind flash attention.
    pub(super) cuda: bool,
}

impl BufferRules {
    /// Bytes that a buffer of this kind sets aside for `id` (`get_alloc_size`, padded).
    pub(super) fn size(self, graph: &Graph, id: TensorId) -> i64 {
        let bytes = self.bytes(graph, id).min(LARGEST);
        bytes.saturating_add(self.alignment - 1) & -self.alignment
    }

    fn bytes(self, graph: &Graph, id: TensorId) -> i64 {
        let tensor = graph.get(id);
        let bytes = tensor.own_bytes;
        if !self.cuda {
            return bytes;
        }
        if tensor.op == Op::FlashAttention {
            return super::cuda::flash_attention_bytes(graph, tensor, bytes);
        }
        if tensor.element.is_quantized() {
            return bytes.saturating_add(super::cuda::row_padding_bytes(tensor.element, tensor.ne));
        }
        bytes
    }
}

/// Free bytes of a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Block {
    pub(super) start: i64,
    pub(super) bytes: i64,
}

impl Block {
    pub(super) fn end(self) -> i64 {
        self.start + self.bytes
    }
}

/// The free blocks of a buffer by offset, the open end last, and the highest byte ever used.
#[derive(Debug, Default)]
pub(super) struct Buffer {
    pub(super) free: Vec<Block>,
    pub(super) peak: i64,
}

/// More than any graph asks for: the open end of a buffer.
const ENDLESS: i64 = i64::MAX / 2;

impl Buffer {
    pub(super) fn reset(&mut self) {
        self.free.clear();
        self.free.push(Block {
            start: 0,
            bytes: ENDLESS,
        });
        self.peak = 0;
    }

    /// The free blocks but the open end.
    pub(super) fn gaps(&self) -> &[Block] {
        self.free.split_last().map_or(&[], |(_, gaps)| gaps)
    }

    /// The block that bytes are taken from: the smallest that fits, of equal ones the last (`size <= best_fit_size` in ggml), the open
    /// end where none does.
    pub(super) fn choice(&self, bytes: i64) -> usize {
        let mut best = self.gaps().len();
        let mut smallest = i64::MAX;
        for (index, block) in self.gaps().iter().enumerate() {
            if block.bytes >= bytes && block.bytes <= smallest {
                best = index;
                smallest = block.bytes;
            }
        }
        best
    }

    pub(super) fn allocate(&mut self, bytes: i64) -> i64 {
        self.take(self.choice(bytes), bytes)
    }

    /// Takes the first bytes of a free block; gives their offset.
    pub(super) fn take(&mut self, choice: usize, bytes: i64) -> i64 {
        let Some(block) = self.free.get_mut(choice) else {
            return 0;
        };
        let offset = block.start;
        block.start += bytes;
        block.bytes -= bytes;
        if block.bytes == 0 {
            self.remove(choice);
        }
        self.peak = self.peak.max(offset + bytes);
        offset
    }

    /// Gives bytes back. Empty blocks count as neighbours, too (`ggml_dyn_tallocr_free_bytes`).
    /// Joins the first block in the list that the bytes touch, or stands alone before the first that lies behind them. The list is not
    /// always sorted: a block of no bytes can end up behind the open end.
    pub(super) fn release(&mut self, offset: i64, bytes: i64) {
        let end = offset + bytes;
        let mut behind = self.free.len();
        for (at, block) in self.free.iter_mut().enumerate() {
            if block.end() == offset {
                block.bytes += bytes;
                self.join_next(at);
                return;
            }
            if block.start == end {
                block.start = offset;
                block.bytes += bytes;
                return;
            }
            if block.start >= offset {
                behind = behind.min(at);
            }
        }
        let alone = Block {
            start: offset,
            bytes,
        };
        self.insert(behind, alone);
    }

    /// `Vec::insert`, which is slower for the few blocks that there are.
    fn insert(&mut self, at: usize, mut block: Block) {
        for later in self.free.iter_mut().skip(at) {
            std::mem::swap(later, &mut block);
        }
        self.free.push(block);
    }

    /// `Vec::remove`, likewise.
    fn remove(&mut self, at: usize) {
        let Some(mut last) = self.free.pop() else {
            return;
        };
        for later in self.free.iter_mut().skip(at).rev() {
            std::mem::swap(later, &mut last);
        }
    }

    /// A block and the next one become one where they touch.
    fn join_next(&mut self, at: usize) {
        let next = self.free.get(at + 1).copied();
        if let (Some(next), Some(block)) = (next, self.free.get_mut(at))
            && next.start == block.end()
        {
            block.bytes += next.bytes;
            self.remove(at + 1);
        }
    }
}

//! Memory for weights: zeros, on a cache line's border, in large pages where the kernel gives them.

use crate::pool::Pool;
use std::alloc::{Layout, dealloc, handle_alloc_error};
use std::fmt;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes of a cache line, and of a vector of all instruction sets.
const ALIGNMENT: usize = 64;

/// Bytes that belong to one owner: a chunk of their own, or a part of one.
pub struct Buffer {
    start: NonNull<u8>,
    bytes: usize,
    /// Lives as long as all its parts.
    _chunk: Arc<Chunk>,
}

// SAFETY: its bytes are nobody else's, as those of a `Vec`.
unsafe impl Send for Buffer {}
// SAFETY: as above.
unsafe impl Sync for Buffer {}

/// The chunk that small buffers are parts of, and how much of it is theirs.
static SHARED: Mutex<Option<(Arc<Chunk>, usize)>> = Mutex::new(None);

impl Buffer {
    /// So many zeros.
    pub fn zeroed(bytes: usize) -> Self {
        let taken = bytes.next_multiple_of(ALIGNMENT).max(ALIGNMENT);
        if taken >= CHUNK_BYTES / 2 {
            return Self::part_of(Arc::new(Chunk::zeroed(taken)), 0, bytes);
        }
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        let (chunk, used) = match shared.take() {
            Some((chunk, used)) if used + taken <= CHUNK_BYTES => (chunk, used),
            _ => (Arc::new(Chunk::zeroed(CHUNK_BYTES)), 0),
        };
        *shared = Some((Arc::clone(&chunk), used + taken));
        Self::part_of(chunk, used, bytes)
    }

    /// The part of a chunk that no other buffer has.
    fn part_of(chunk: Arc<Chunk>, offset: usize, bytes: usize) -> Self {
        assert!(offset + bytes <= chunk.layout.size());
        Self {
            // SAFETY: inside of the chunk.
            start: unsafe { chunk.start.add(offset) },
            bytes,
            _chunk: chunk,
        }
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: a part of a chunk, all initialised, that is only this buffer's.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.bytes) }
    }

    /// The bytes, to write to.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `self` is borrowed for as long.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.bytes) }
    }
}

impl Buffer {
    /// Calls `work` with the number, counted from 0, and the bytes of each of these blocks, on all threads.
    ///
    /// # Panics
    /// The buffer has not so many blocks.
    pub fn for_each_block(
        &mut self,
        pool: &Pool,
        block_bytes: usize,
        blocks: Range<usize>,
        work: impl Fn(usize, &mut [u8]) + Sync,
    ) {
        let all = self.as_mut_slice().chunks_exact_mut(block_bytes.max(1));
        let these: Vec<_> = all
            .skip(blocks.start)
            .take(blocks.len())
            .map(Mutex::new)
            .collect();
        assert_eq!(these.len(), blocks.len(), "blocks that are not there");
        pool.run(these.len(), &|index| {
            let mut block = these[index].lock().unwrap_or_else(PoisonError::into_inner);
            work(index, &mut block);
        });
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.bytes)
    }
}

/// What the system is asked for at a time.
struct Chunk {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: a chunk only owns; its bytes are reached through buffers.
unsafe impl Send for Chunk {}
// SAFETY: as above.
unsafe impl Sync for Chunk {}

impl Chunk {
    fn zeroed(bytes: usize) -> Self {
        let layout = Layout::from_size_align(bytes, LARGE_PAGE_BYTES);
        let layout = layout.expect("less than all memory");
        // SAFETY: the layout is not empty.
        let Some(start) = NonNull::new(unsafe { std::alloc::alloc(layout) }) else {
            handle_alloc_error(layout)
        };
        ask_for_large_pages(start, bytes);
        // SAFETY: ours, just allocated, this long. Touches the pages in their final size.
        unsafe { start.write_bytes(0, bytes) };
        Self { start, layout }
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        // SAFETY: from `zeroed`, with this layout; no buffer is left.
        unsafe { dealloc(self.start.as_ptr(), self.layout) };
    }
}

/// Of small weights' chunks: pages of the larger size, and as much as a rank may have too many.
const CHUNK_BYTES: usize = 2 * LARGE_PAGE_BYTES;

/// A page of the larger size, of x86-64 and of most others.
const LARGE_PAGE_BYTES: usize = 2 << 20;

/// A weight in pages of 4 KiB is a page fault for each when it is written, and a miss of the TLB for each when it
/// is read. Where the kernel has no larger ones, nothing is lost.
#[cfg(target_os = "linux")]
fn ask_for_large_pages(start: NonNull<u8>, bytes: usize) {
    // SAFETY: a range of our own, on a page's border; the advice changes no byte.
    unsafe { libc::madvise(start.as_ptr().cast(), bytes, libc::MADV_HUGEPAGE) };
}

#[cfg(not(target_os = "linux"))]
fn ask_for_large_pages(_: NonNull<u8>, _: usize) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_zeros_on_a_cache_lines_border_and_do_not_overlap() {
        let sizes = [
            0,
            1,
            64,
            65,
            100_000,
            CHUNK_BYTES / 2,
            CHUNK_BYTES + 1,
            1_500_000,
            1_500_000,
        ];
        let mut buffers: Vec<Buffer> = sizes.into_iter().map(Buffer::zeroed).collect();
        for (mark, buffer) in buffers.iter_mut().enumerate() {
            assert!(buffer.as_slice().iter().all(|&byte| byte == 0));
            assert!(buffer.as_slice().as_ptr().addr().is_multiple_of(ALIGNMENT));
            buffer.as_mut_slice().fill(mark as u8 + 1);
        }
        for (mark, (buffer, bytes)) in buffers.iter().zip(sizes).enumerate() {
            assert_eq!(buffer.as_slice().len(), bytes);
            assert!(buffer.as_slice().iter().all(|&byte| byte == mark as u8 + 1));
        }
    }
}

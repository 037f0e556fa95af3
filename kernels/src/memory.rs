//! Memory for weights: zeros, on a cache line's border, in large pages where the kernel gives them.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::fmt;
use std::ptr::NonNull;

/// Bytes of a cache line, and of a vector of all instruction sets.
const ALIGNMENT: usize = 64;

/// Bytes that belong to one owner.
pub struct Buffer {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: owns its bytes as a `Vec` does.
unsafe impl Send for Buffer {}
// SAFETY: as above.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// So many zeros.
    pub fn zeroed(bytes: usize) -> Self {
        let layout =
            Layout::from_size_align(bytes.max(1), ALIGNMENT).expect("less than all memory");
        let layout = match bytes >= LARGE_PAGE_BYTES {
            true => layout
                .align_to(LARGE_PAGE_BYTES)
                .expect("less than all memory"),
            false => layout,
        };
        // SAFETY: the layout is not empty.
        let start = match bytes >= LARGE_PAGE_BYTES {
            true => unsafe { std::alloc::alloc(layout) },
            false => unsafe { alloc_zeroed(layout) },
        };
        let Some(start) = NonNull::new(start) else {
            handle_alloc_error(layout)
        };
        if bytes >= LARGE_PAGE_BYTES {
            ask_for_large_pages(start, bytes);
            // SAFETY: ours, just allocated, this long. Touches the pages in their final size.
            unsafe { start.write_bytes(0, bytes) };
        }
        Self { start, layout }
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: allocated with this length, all initialised.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.layout.size()) }
    }

    /// The bytes, to write to.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `self` is borrowed for as long.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.layout.size()) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: from `zeroed`, with this layout.
        unsafe { dealloc(self.start.as_ptr(), self.layout) };
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.layout.size())
    }
}

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

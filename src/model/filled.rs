//! An array whose memory is written once, where MLX allocated it.
//!
//! MLX copies what it is handed, so an array made from bytes in memory is there twice for a while, and the
//! copy is written to fresh pages of 4 KiB, each of which the kernel has to clear and map. MLX's `Load`, which
//! is how it reads its own files, hands out the memory before anything touched it. So a tensor is presented
//! as such a file (in NumPy's format, version 1), whose contents a closure writes. On a CUDA device the memory is the
//! host's for a moment, and MLX copies it over.

use anyhow::{Result, anyhow, ensure};
use mlx_rs::{Array, Device, Dtype, Stream};
use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::{Arc, Mutex};

/// Writes all bytes of an array, row-major, little-endian.
pub type Fill = Box<dyn FnOnce(&mut [u8]) -> Result<()> + Send>;

/// What became of the closure: not called yet, or called with this result.
type Outcome = Arc<Mutex<Option<Result<()>>>>;

/// A file in memory: a header, then what the closure writes.
struct Source {
    header: Vec<u8>,
    /// Bytes of the header read so far.
    position: usize,
    fill: Option<Fill>,
    outcome: Outcome,
}

/// An array of this shape and dtype with the bytes that `fill` writes.
///
/// # Errors
/// What `fill` fails with, a dtype that is no weight's, or a failure of MLX.
pub fn filled(shape: &[i32], dtype: Dtype, fill: Fill) -> Result<Array> {
    let outcome = Outcome::default();
    let source = Box::new(Source {
        header: header(shape, dtype)?,
        position: 0,
        fill: Some(fill),
        outcome: Arc::clone(&outcome),
    });
    let array = load(source)?;
    let array = match dtype {
        Dtype::Bfloat16 => array.view_dtype(dtype)?,
        _ => array,
    };
    array.eval()?;
    let outcome = outcome.lock().map(|mut outcome| outcome.take());
    outcome
        .ok()
        .flatten()
        .unwrap_or_else(|| Err(anyhow!("MLX made an array without reading it")))?;
    Ok(array)
}

/// NumPy's header as MLX writes it, which is also the only form that MLX reads. There is no bf16 in it:
/// that is read as integers of 16 bits, and seen as what it is afterwards.
fn header(shape: &[i32], dtype: Dtype) -> Result<Vec<u8>> {
    let kind = match dtype {
        Dtype::Uint32 => "<u4",
        Dtype::Float32 => "<f4",
        Dtype::Float16 => "<f2",
        Dtype::Bfloat16 => "<u2",
        other => return Err(anyhow!("dtype {other:?} cannot be a weight")),
    };
    let dims: String = shape.iter().map(|dim| format!("{dim}, ")).collect();
    let text = format!("{{'descr': '{kind}', 'fortran_order': False, 'shape': ({dims})}}\n");
    let length = u16::try_from(text.len())?;
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend(length.to_le_bytes());
    bytes.extend(text.as_bytes());
    Ok(bytes)
}

/// MLX's array over the source, not yet read.
fn load(source: Box<Source>) -> Result<Array> {
    // Metal has no `Load` of its own, and needs none: its memory is the CPU's.
    let device = match cfg!(target_os = "macos") {
        true => Device::cpu(),
        false => Device::try_default()?,
    };
    let stream = Stream::try_default_on_device(&device)?;
    let table = mlx_sys::mlx_io_vtable {
        is_open: Some(always),
        good: Some(always),
        tell: Some(tell),
        seek: Some(seek),
        read: Some(read),
        read_at_offset: Some(read_at_offset),
        write: Some(write),
        label: Some(label),
        free: Some(free),
    };
    // SAFETY: MLX owns the source from here on and gives it back to `free` once; the functions of the
    // table take it as what it is. The handle to the reader is freed here, MLX holds its own.
    unsafe {
        let reader = mlx_sys::mlx_io_reader_new(Box::into_raw(source).cast(), table);
        let mut handle = mlx_sys::mlx_array_new();
        let status = mlx_sys::mlx_load_reader(&mut handle, reader, stream.as_ptr());
        mlx_sys::mlx_io_reader_free(reader);
        let array = Array::from_ptr(handle);
        ensure!(status == 0, "MLX could not make an array to load into");
        Ok(array)
    }
}

/// # Safety
/// `source` is what [`load`] gave away and [`free`] has not yet had. MLX calls one function at a time: the
/// header while [`load`] runs, the contents once, in one of its threads, while [`filled`] waits.
unsafe fn source<'a>(source: *mut c_void) -> &'a mut Source {
    // SAFETY: the caller's promise.
    unsafe { &mut *source.cast::<Source>() }
}

unsafe extern "C" fn always(_: *mut c_void) -> bool {
    true
}

unsafe extern "C" fn tell(desc: *mut c_void) -> usize {
    // SAFETY: MLX passes what `load` gave it.
    unsafe { source(desc) }.position
}

unsafe extern "C" fn seek(_: *mut c_void, _: i64, _: c_int) -> c_int {
    -1
}

/// The header, piece by piece.
unsafe extern "C" fn read(desc: *mut c_void, data: *mut c_char, length: usize) -> usize {
    // SAFETY: MLX passes what `load` gave it.
    let source = unsafe { source(desc) };
    let rest = &source.header[source.position..];
    let count = rest.len().min(length);
    // SAFETY: `data` has room for `length` bytes, and is MLX's, not the header.
    unsafe { std::ptr::copy_nonoverlapping(rest.as_ptr(), data.cast(), count) };
    source.position += count;
    count
}

/// The contents, at once. Says that it read all even where it failed, for MLX would end the process on an
/// error in one of its threads; [`filled`] looks at the outcome.
unsafe extern "C" fn read_at_offset(
    desc: *mut c_void,
    data: *mut c_char,
    length: usize,
    _offset: usize,
) -> usize {
    // SAFETY: MLX passes what `load` gave it.
    let source = unsafe { source(desc) };
    let Some(fill) = source.fill.take() else {
        return length;
    };
    ask_for_large_pages(data.cast(), length);
    // SAFETY: MLX has just allocated these bytes for the array, and touches them again once this returns.
    // The closures of this program only write to them, and bytes may hold anything.
    let bytes = unsafe { std::slice::from_raw_parts_mut(data.cast::<u8>(), length) };
    let filled = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| fill(bytes)));
    let filled = filled.unwrap_or_else(|_| Err(anyhow!("reading a tensor panicked")));
    if let Ok(mut outcome) = source.outcome.lock() {
        *outcome = Some(filled);
    }
    length
}

unsafe extern "C" fn write(_: *mut c_void, _: *const c_char, _: usize) -> usize {
    0
}

unsafe extern "C" fn label(_: *mut c_void) -> *const c_char {
    const LABEL: &CStr = c"a tensor of the checkpoint";
    LABEL.as_ptr()
}

unsafe extern "C" fn free(desc: *mut c_void) {
    // SAFETY: from `Box::into_raw` in `load`; MLX calls this once, last.
    drop(unsafe { Box::from_raw(desc.cast::<Source>()) });
}

/// Fresh memory in pages of 2 MiB is written to faster than in pages of 4 KiB, each of which is a fault, and read
/// with fewer misses afterwards. Where the kernel does not do it, nothing is lost.
#[cfg(target_os = "linux")]
fn ask_for_large_pages(data: *mut u8, length: usize) {
    const PAGE_BYTES: usize = 4096;
    let begin = data.addr().next_multiple_of(PAGE_BYTES);
    let end = (data.addr() + length) / PAGE_BYTES * PAGE_BYTES;
    if end > begin {
        // SAFETY: whole pages inside an allocation of our process; the advice changes no byte.
        unsafe {
            libc::madvise(
                data.with_addr(begin).cast(),
                end - begin,
                libc::MADV_HUGEPAGE,
            )
        };
    }
}

#[cfg(not(target_os = "linux"))]
fn ask_for_large_pages(_: *mut u8, _: usize) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_array_holds_what_was_written() {
        let fill: Fill = Box::new(|bytes| {
            for (value, place) in bytes.chunks_exact_mut(4).enumerate() {
                place.copy_from_slice(&(value as f32).to_le_bytes());
            }
            Ok(())
        });
        let array = filled(&[3, 1, 5], Dtype::Float32, fill).unwrap();
        assert_eq!(array.shape(), [3, 1, 5]);
        let expected: Vec<f32> = (0..15).map(|value| value as f32).collect();
        assert_eq!(array.as_slice::<f32>(), expected);
    }

    #[test]
    fn every_dtype_of_a_weight_comes_out_as_itself() {
        for (dtype, bytes) in [
            (Dtype::Uint32, 4),
            (Dtype::Float32, 4),
            (Dtype::Float16, 2),
            (Dtype::Bfloat16, 2),
        ] {
            let fill: Fill = Box::new(move |all| {
                assert_eq!(all.len(), 7 * bytes);
                all.fill(0);
                Ok(())
            });
            let array = filled(&[7], dtype, fill).unwrap();
            assert_eq!((array.dtype(), array.shape()), (dtype, &[7][..]));
        }
        assert!(filled(&[7], Dtype::Complex64, Box::new(|_| Ok(()))).is_err());
    }

    #[test]
    fn what_the_closure_fails_with_is_the_error() {
        let error = filled(&[2], Dtype::Float32, Box::new(|_| Err(anyhow!("no disk"))));
        assert_eq!(error.unwrap_err().to_string(), "no disk");
        let error = filled(&[2], Dtype::Float32, Box::new(|_| panic!("oh")));
        assert!(error.unwrap_err().to_string().contains("panicked"));
    }
}

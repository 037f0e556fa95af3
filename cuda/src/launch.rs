//! A kernel, its arguments and its grid.

use crate::device::{Buffer, Gpu};
use anyhow::{Context, Result};
use cudarc::driver::CudaFunction;
use cudarc::driver::sys;
use std::ffi::c_void;

/// A kernel of one program.
#[derive(Debug)]
pub(crate) struct Kernel {
    function: CudaFunction,
    threads: u32,
    /// Bytes of shared memory beside what it declares.
    shared: u32,
}

/// What kernels take: bytes as C lays them out.
///
/// # Safety
/// What [`Self::start`] points to has the layout of the kernel's parameter, and lives as long as the value.
pub(crate) unsafe trait Parameter {
    /// Where the bytes are.
    fn start(&self) -> *const c_void {
        std::ptr::from_ref(self).cast()
    }
}

// SAFETY: plain numbers, and addresses as 64 bits.
unsafe impl Parameter for i32 {}
// SAFETY: as above.
unsafe impl Parameter for f32 {}
// SAFETY: as above.
unsafe impl Parameter for u64 {}

/// A struct of addresses and pairs of smaller numbers, word by word.
#[derive(Debug)]
pub(crate) struct Words(pub(crate) Vec<u64>);

// SAFETY: the words follow one another, aligned for addresses; that they are those of the parameter is the caller's
// promise to `Kernel::launch`.
unsafe impl Parameter for Words {
    fn start(&self) -> *const c_void {
        self.0.as_ptr().cast()
    }
}

/// The arguments of a launch, in the order of the kernel's parameters.
pub(crate) type Arguments<'a> = &'a [&'a dyn Parameter];

/// The address that a kernel takes for a buffer; of none, null.
pub(crate) fn address(buffer: Option<&Buffer>) -> u64 {
    buffer.map_or(0, Buffer::address)
}

impl Kernel {
    pub(crate) fn new(function: CudaFunction, threads: u32) -> Self {
        Self {
            function,
            threads,
            shared: 0,
        }
    }

    /// With so many bytes of shared memory for each of its thread blocks.
    ///
    /// # Errors
    /// The GPU has less.
    pub(crate) fn with_shared(mut self, bytes: usize) -> Result<Self> {
        let most = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        let set = self.function.set_attribute(most, bytes as i32);
        set.with_context(|| format!("asking for {bytes} bytes of shared memory"))?;
        self.shared = bytes as u32;
        Ok(self)
    }

    /// Asks for the kernel after all work so far; it may begin while the kernel before it ends.
    ///
    /// # Safety
    /// The arguments have the kernel's types, their addresses are of buffers on `gpu` that have room for all that the
    /// kernel reads and writes with this grid, and they live until the work is finished.
    pub(crate) unsafe fn launch(
        &self,
        gpu: &Gpu,
        grid: [usize; 3],
        arguments: Arguments,
    ) -> Result<()> {
        let mut pointers: Vec<*mut c_void> = arguments
            .iter()
            .map(|&argument| argument.start().cast_mut())
            .collect();
        // SAFETY: all zeros are a valid value of this type, which C initialises so.
        let mut overlap: sys::CUlaunchAttribute = unsafe { std::mem::zeroed() };
        overlap.id =
            sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        overlap.value.programmaticStreamSerializationAllowed = 1;
        let [x, y, z] = grid.map(|size| size as u32);
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: self.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: self.shared,
            hStream: gpu.stream(),
            attrs: &mut overlap,
            // Kernels of older GPUs do not wait for one another by themselves.
            numAttrs: (gpu.capability() >= (9, 0)).into(),
        };
        // SAFETY: the configuration and the pointers live through the call, which copies them; the rest is the
        // caller's promise.
        unsafe {
            sys::cuLaunchKernelEx(
                &config,
                self.function.cu_function(),
                pointers.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        }
        .result()
        .context("launching a kernel")
    }
}

//! A GPU, its memory, and the order of work on it: one context, one stream.

use anyhow::{Context, Result, anyhow, bail};
use cudarc::driver::sys::{self, CUdeviceptr};
use cudarc::driver::{CudaContext, CudaGraph, CudaStream, DriverError};
use std::ffi::c_void;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Lowest compute capability that the kernels are written for: bf16 products and asynchronous copies.
const LEAST_CAPABILITY: (i32, i32) = (8, 0);

const MOST_SHARED: sys::CUdevice_attribute =
    sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;

const MEMORY_CLOCK_KHZ: sys::CUdevice_attribute =
    sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE;
const MEMORY_BUS_BITS: sys::CUdevice_attribute =
    sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH;
const MULTIPROCESSORS: sys::CUdevice_attribute =
    sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;

/// One GPU, as one rank uses it.
pub struct Gpu {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    name: String,
    capability: (i32, i32),
    shared_bytes: usize,
    multiprocessors: usize,
    memory_bytes: u64,
    bytes_per_s: u64,
    allocated_bytes: AtomicU64,
    peak_bytes: AtomicU64,
}

impl fmt::Debug for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.debug_struct("Gpu").field("name", &self.name).finish()
    }
}

/// How many GPUs this host has that a program can use; 0 where there is no driver.
pub fn count() -> usize {
    // SAFETY: looking for the driver's library runs its initialisers, as every use of a GPU does.
    if !unsafe { sys::is_culib_present() } {
        return 0;
    }
    let count = cudarc::driver::result::init().and_then(|()| CudaContext::device_count());
    count.map_or(0, |count| count.max(0) as usize)
}

impl Gpu {
    /// The GPU of this number, counted from 0 as the driver counts them.
    ///
    /// # Errors
    /// There is none, the driver fails, or the GPU is too old for the kernels.
    pub fn open(ordinal: usize) -> Result<Arc<Self>> {
        let count = count();
        if ordinal >= count {
            bail!("GPU {ordinal} was asked for, and this host has {count}");
        }
        let open = || -> Result<Self, DriverError> {
            let context = CudaContext::new(ordinal)?;
            // Everything here goes through one stream, whose order is all the order that is needed.
            // SAFETY: no memory is freed while a kernel uses it, since freeing waits for the device.
            unsafe { context.disable_event_tracking() };
            Ok(Self {
                stream: context.new_stream()?,
                name: context.name()?,
                capability: context.compute_capability()?,
                shared_bytes: context.attribute(MOST_SHARED)?.try_into().unwrap_or(0),
                multiprocessors: context.attribute(MULTIPROCESSORS)?.try_into().unwrap_or(1),
                memory_bytes: context.total_mem()? as u64,
                bytes_per_s: {
                    // A driver may have stopped telling: the numbers are good for a guess only.
                    let number = |attribute| context.attribute(attribute).ok()?.try_into().ok();
                    let clock_khz: u64 = number(MEMORY_CLOCK_KHZ).unwrap_or(0);
                    let bus_bits: u64 = number(MEMORY_BUS_BITS).unwrap_or(0);
                    // Two transfers a cycle.
                    2 * 1000 * clock_khz * bus_bits / 8
                },
                context,
                allocated_bytes: AtomicU64::new(0),
                peak_bytes: AtomicU64::new(0),
            })
        };
        let gpu = open().map_err(|error| failed("using GPU", ordinal, error))?;
        if gpu.capability < LEAST_CAPABILITY {
            let (major, minor) = gpu.capability;
            bail!(
                "GPU {ordinal}, a {}, has compute capability {major}.{minor}; the kernels need {}.{}",
                gpu.name,
                LEAST_CAPABILITY.0,
                LEAST_CAPABILITY.1
            );
        }
        Ok(Arc::new(gpu))
    }

    /// What the maker calls it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Bytes of memory it has.
    pub fn memory_bytes(&self) -> u64 {
        self.memory_bytes
    }

    /// Bytes a second that its memory carries by what the driver says of its clock and its width; 0 where it says nothing.
    pub fn bytes_per_s(&self) -> u64 {
        self.bytes_per_s
    }

    /// Most bytes that were ever allocated here.
    pub fn peak_bytes(&self) -> u64 {
        self.peak_bytes.load(Ordering::Relaxed)
    }

    /// Counts the peak anew, from what is allocated now.
    pub fn forget_peak(&self) {
        let now = self.allocated_bytes.load(Ordering::Relaxed);
        self.peak_bytes.store(now, Ordering::Relaxed);
    }

    /// Bytes of shared memory that a thread block can have beside the few that it declares.
    pub(crate) fn shared_bytes(&self) -> usize {
        self.shared_bytes.saturating_sub(1024)
    }

    /// Multiprocessors it has.
    pub(crate) fn multiprocessors(&self) -> usize {
        self.multiprocessors.max(1)
    }

    /// Compute capability, major and minor.
    pub(crate) fn capability(&self) -> (i32, i32) {
        self.capability
    }

    pub(crate) fn context(&self) -> &Arc<CudaContext> {
        &self.context
    }

    pub(crate) fn stream(&self) -> sys::CUstream {
        self.stream.cu_stream()
    }

    /// Waits until all work so far is done.
    ///
    /// # Errors
    /// Some of it failed.
    pub fn finish(&self) -> Result<()> {
        self.stream.synchronize().context("waiting for the GPU")
    }

    /// Records what `work` asks of the GPU instead of doing it, to be done with [`Recording::play`].
    ///
    /// # Errors
    /// `work` fails, or asks for what cannot be recorded.
    pub fn record(&self, work: impl FnOnce() -> Result<()>) -> Result<Recording> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        self.stream.begin_capture(mode)?;
        let worked = work();
        let recorded = self.stream.end_capture(sys::CUgraphInstantiate_flags(0));
        worked?;
        let graph = recorded.context("recording work for the GPU")?;
        Ok(Recording(graph.context("no work was recorded")?))
    }

    fn bind(&self) -> Result<()> {
        Ok(self.context.bind_to_thread()?)
    }
}

/// Work that was recorded.
pub struct Recording(CudaGraph);

impl fmt::Debug for Recording {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("Recording")
    }
}

impl Recording {
    /// Does the work, after all that was asked for before.
    ///
    /// # Errors
    /// The driver fails.
    pub fn play(&self) -> Result<()> {
        Ok(self.0.launch()?)
    }
}

fn failed(doing: &str, ordinal: usize, error: DriverError) -> anyhow::Error {
    anyhow!(error).context(format!("{doing} {ordinal}"))
}

/// Memory on a GPU.
pub struct Buffer {
    gpu: Arc<Gpu>,
    address: CUdeviceptr,
    bytes: usize,
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "Buffer({} bytes)", self.bytes)
    }
}

impl Buffer {
    /// So many bytes, all zero.
    ///
    /// # Errors
    /// The GPU has too little memory left.
    pub fn zeroed(gpu: &Arc<Gpu>, bytes: usize) -> Result<Self> {
        let buffer = Self::allocate(gpu, bytes)?;
        // SAFETY: the allocation has as many bytes.
        unsafe { sys::cuMemsetD8Async(buffer.address, 0, buffer.bytes, gpu.stream()) }.result()?;
        Ok(buffer)
    }

    fn allocate(gpu: &Arc<Gpu>, bytes: usize) -> Result<Self> {
        gpu.bind()?;
        let bytes = bytes.max(16);
        // SAFETY: an allocation, which this value owns.
        let address = unsafe { cudarc::driver::result::malloc_sync(bytes) };
        let address = address.with_context(|| {
            format!(
                "allocating {:.3} GB on a {} of {:.1} GB, {:.3} GB of which this program has",
                bytes as f64 / 1e9,
                gpu.name,
                gpu.memory_bytes as f64 / 1e9,
                gpu.allocated_bytes.load(Ordering::Relaxed) as f64 / 1e9
            )
        })?;
        let before = gpu
            .allocated_bytes
            .fetch_add(bytes as u64, Ordering::Relaxed);
        gpu.peak_bytes
            .fetch_max(before + bytes as u64, Ordering::Relaxed);
        Ok(Self {
            gpu: Arc::clone(gpu),
            address,
            bytes,
        })
    }

    /// A copy of these bytes.
    ///
    /// # Errors
    /// As [`Self::zeroed`].
    pub fn of(gpu: &Arc<Gpu>, bytes: &[u8]) -> Result<Self> {
        let buffer = match bytes.len() {
            0..16 => Self::zeroed(gpu, bytes.len())?,
            length => Self::allocate(gpu, length)?,
        };
        buffer.write_at(0, bytes)?;
        Ok(buffer)
    }

    /// Bytes it has.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Where it is, for kernels.
    pub(crate) fn address(&self) -> CUdeviceptr {
        self.address
    }

    /// Copies bytes to place `at`, after all work so far, and waits for it.
    ///
    /// # Errors
    /// They do not fit, or the driver fails.
    pub fn write_at(&self, at: usize, bytes: &[u8]) -> Result<()> {
        self.check(at, bytes.len())?;
        self.gpu.bind()?;
        // SAFETY: source and target have as many bytes, and the copy has ended before this returns.
        unsafe {
            sys::cuMemcpyHtoDAsync_v2(
                self.address + at as u64,
                bytes.as_ptr().cast(),
                bytes.len(),
                self.gpu.stream(),
            )
        }
        .result()
        .context("copying to the GPU")?;
        self.gpu.finish()
    }

    /// Begins to copy the first bytes of `from`, after all work so far.
    ///
    /// # Errors
    /// They do not fit, or the driver fails.
    pub fn begin_write(&self, from: &Pinned, bytes: usize) -> Result<()> {
        self.check(0, bytes)?;
        from.check(bytes)?;
        // SAFETY: both have as many bytes. The pinned memory is not written before the work is finished: whoever
        // writes to it, waits (see `Pinned::bytes_mut`).
        unsafe {
            sys::cuMemcpyHtoDAsync_v2(
                self.address,
                from.start.cast_const(),
                bytes,
                self.gpu.stream(),
            )
        }
        .result()
        .context("copying to the GPU")
    }

    /// Begins to copy bytes from place `at` to the start of `to`, after all work so far.
    ///
    /// # Errors
    /// There are not so many, or the driver fails.
    pub fn begin_read(&self, at: usize, to: &mut Pinned, bytes: usize) -> Result<()> {
        self.check(at, bytes)?;
        to.check(bytes)?;
        // SAFETY: both have as many bytes. They are read after the work is finished.
        unsafe {
            sys::cuMemcpyDtoHAsync_v2(to.start, self.address + at as u64, bytes, self.gpu.stream())
        }
        .result()
        .context("copying from the GPU")
    }

    /// Copies bytes of `from` to here, after all work so far.
    ///
    /// # Errors
    /// They do not fit, or the driver fails.
    pub fn copy_from(&self, at: usize, from: &Buffer, from_at: usize, bytes: usize) -> Result<()> {
        self.check(at, bytes)?;
        from.check(from_at, bytes)?;
        // SAFETY: both have as many bytes, and do not overlap unless they are the same buffer and places: checked.
        if self.address == from.address && at.abs_diff(from_at) < bytes {
            bail!("a copy within a buffer overlaps itself");
        }
        unsafe {
            sys::cuMemcpyDtoDAsync_v2(
                self.address + at as u64,
                from.address + from_at as u64,
                bytes,
                self.gpu.stream(),
            )
        }
        .result()
        .context("copying on the GPU")
    }

    fn check(&self, at: usize, bytes: usize) -> Result<()> {
        match at.checked_add(bytes).is_some_and(|end| end <= self.bytes) {
            true => Ok(()),
            false => bail!("bytes {at} to {at} + {bytes} of a buffer of {}", self.bytes),
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let _ = self.gpu.finish();
        let _ = self.gpu.bind();
        // SAFETY: the allocation is this value's own, and no work uses it any more.
        let _ = unsafe { cudarc::driver::result::free_sync(self.address) };
        self.gpu
            .allocated_bytes
            .fetch_sub(self.bytes as u64, Ordering::Relaxed);
    }
}

/// Memory of the host that a GPU copies to and from by itself.
pub struct Pinned {
    gpu: Arc<Gpu>,
    start: *mut c_void,
    bytes: usize,
}

// SAFETY: the memory is this value's own, and readable from any thread.
unsafe impl Send for Pinned {}

impl fmt::Debug for Pinned {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "Pinned({} bytes)", self.bytes)
    }
}

impl Pinned {
    /// So many bytes, all zero.
    ///
    /// # Errors
    /// The host has too little memory that can be pinned.
    pub fn zeroed(gpu: &Arc<Gpu>, bytes: usize) -> Result<Self> {
        gpu.bind()?;
        let bytes = bytes.max(16);
        let mut start = std::ptr::null_mut();
        // SAFETY: an allocation, which this value owns, and which is written before it is read.
        unsafe { sys::cuMemAllocHost_v2(&mut start, bytes) }
            .result()
            .with_context(|| format!("pinning {bytes} bytes of the host's memory"))?;
        // SAFETY: `start` has `bytes` bytes.
        unsafe { start.cast::<u8>().write_bytes(0, bytes) };
        Ok(Self {
            gpu: Arc::clone(gpu),
            start,
            bytes,
        })
    }

    /// Bytes it has.
    pub fn capacity(&self) -> usize {
        self.bytes
    }

    /// All of it, once the GPU has finished its work so far.
    ///
    /// # Errors
    /// The work failed.
    pub fn bytes(&self) -> Result<&[u8]> {
        self.gpu.finish()?;
        // SAFETY: no copy is under way, and none can begin while this is borrowed (`begin_read` borrows mutably).
        Ok(unsafe { std::slice::from_raw_parts(self.start.cast(), self.bytes) })
    }

    /// The same, to be written.
    ///
    /// # Errors
    /// The work failed.
    pub fn bytes_mut(&mut self) -> Result<&mut [u8]> {
        self.gpu.finish()?;
        // SAFETY: no copy is under way, and none can begin while this is borrowed.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.start.cast(), self.bytes) })
    }

    fn check(&self, bytes: usize) -> Result<()> {
        match bytes <= self.bytes {
            true => Ok(()),
            false => bail!("{bytes} bytes of {} that are pinned", self.bytes),
        }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let _ = self.gpu.finish();
        let _ = self.gpu.bind();
        // SAFETY: the allocation is this value's own, and no copy is under way.
        let _ = unsafe { sys::cuMemFreeHost(self.start) };
    }
}

//! [`Device`]: a GPU or the native CPU, one type.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use serde::Serialize;

use crate::backend::adapter::{self, Adapter};
use crate::backend::gpu::Gpu;
use crate::backend::wait::wait_for;
use crate::error::{Error, ErrorKind, Result};
use crate::kernels::choice::{KernelChoice, KernelOverride};

/// The environment variable that [`Device::new`] obeys.
const VARIABLE: &str = "GATEFOLD_DEVICE";

/// Where tensors live and kernels run: a wgpu adapter or the native CPU. Clones are the same device.
///
/// On a GPU, operations queue up and run when something is read back, when a trainer's step ends, on [`Device::submit`] or
/// [`Device::synchronize`], or when very many have queued up. On the CPU they run at once.
#[derive(Clone)]
pub struct Device {
    inner: Arc<Inner>,
}

struct Inner {
    backend: Backend,
    /// Bytes that tensors hold, now and at most.
    held: AtomicU64,
    peak: AtomicU64,
    batch_invariant: AtomicBool,
    kernels: Mutex<KernelOverride>,
    /// Inside of [`Device::explain`], the choices so far.
    choices: Mutex<Option<Vec<KernelChoice>>>,
    #[cfg(feature = "verify")]
    poison: AtomicBool,
}

/// The two kinds of device; kernels match on it.
#[allow(clippy::large_enum_variant, reason = "there is one a device, behind an Arc")]
pub(crate) enum Backend {
    Native,
    Gpu(Gpu),
}

/// Bytes of memory that tensors on a device hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryUse {
    /// Now.
    pub held: u64,
    /// The most since the device was opened or [`Device::reset_peak`] was called.
    pub peak: u64,
}

/// How long one kernel took in [`Device::profile`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct KernelTime {
    /// Its name: `gemm`, `lstm_step_forward`.
    pub kernel: &'static str,
    /// How often it was launched.
    pub launches: usize,
    /// All launches together.
    pub time: Duration,
}

/// What is known of one adapter, an open device, or the native CPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct DeviceInfo {
    /// The name that the driver gives, or `cpu`.
    pub name: String,
    /// `vulkan`, `metal`, `dx12`, `gl`, `webgpu`, or `native`.
    pub backend: String,
    /// The driver's name and version; empty for the native CPU.
    pub driver: String,
    /// `discrete`, `integrated`, `virtual`, `other`, `software`, or `native`.
    pub kind: String,
    /// Optional features that kernels may use, by wgpu's names: those that the adapter offers, or that the device was opened with.
    pub features: Vec<String>,
    /// The limits that matter here, by wgpu's names, of the adapter or of the device.
    pub limits: Vec<(String, u64)>,
}

impl fmt::Display for DeviceInfo {
    /// `NVIDIA H200 (vulkan, discrete, NVIDIA 580.159)`, or `cpu (native, 2 threads)`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.backend == "native" {
            let threads = crate::backend::native::threads();
            return write!(f, "cpu (native, {threads} thread{})", if threads == 1 { "" } else { "s" });
        }
        let driver = if self.driver.is_empty() { String::new() } else { format!(", {}", self.driver) };
        write!(f, "{} ({}, {}{driver})", self.name, self.backend, self.kind)
    }
}

impl DeviceInfo {
    fn native() -> Self {
        let (features, limits) = (Vec::new(), Vec::new());
        Self { name: "cpu".into(), backend: "native".into(), driver: String::new(), kind: "native".into(), features, limits }
    }

    fn of_adapter(adapter: &Adapter) -> Self {
        let mut offered = adapter.adapter.features();
        if adapter::cooperative_edge(&adapter.adapter).is_none() {
            offered.remove(wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX);
        }
        Self::of_wgpu(&adapter.info, offered, &adapter.adapter.limits())
    }

    fn of_wgpu(info: &wgpu::AdapterInfo, offered: wgpu::Features, limits: &wgpu::Limits) -> Self {
        let useful = [
            ("SUBGROUP", wgpu::Features::SUBGROUP),
            ("SHADER_F16", wgpu::Features::SHADER_F16),
            ("TIMESTAMP_QUERY", wgpu::Features::TIMESTAMP_QUERY),
            ("EXPERIMENTAL_COOPERATIVE_MATRIX", wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX),
        ];
        let limits = [
            ("max_buffer_size", limits.max_buffer_size),
            ("max_storage_buffer_binding_size", limits.max_storage_buffer_binding_size),
            ("max_storage_buffers_per_shader_stage", limits.max_storage_buffers_per_shader_stage.into()),
            ("max_compute_workgroup_storage_size", limits.max_compute_workgroup_storage_size.into()),
            ("max_compute_invocations_per_workgroup", limits.max_compute_invocations_per_workgroup.into()),
            ("subgroup_min_size", info.subgroup_min_size.into()),
            ("subgroup_max_size", info.subgroup_max_size.into()),
        ];
        let kind = match info.device_type {
            wgpu::DeviceType::DiscreteGpu => "discrete",
            wgpu::DeviceType::IntegratedGpu => "integrated",
            wgpu::DeviceType::VirtualGpu => "virtual",
            wgpu::DeviceType::Cpu => "software",
            wgpu::DeviceType::Other => "other",
        };
        Self {
            name: info.name.clone(),
            backend: adapter::backend_name(info.backend).to_owned(),
            driver: format!("{} {}", info.driver, info.driver_info).trim().to_owned(),
            kind: kind.to_owned(),
            features: useful.iter().filter(|(_, f)| offered.contains(*f)).map(|(name, _)| (*name).to_owned()).collect(),
            limits: limits.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect(),
        }
    }
}

impl Device {
    /// The device that `GATEFOLD_DEVICE` names, else the best hardware GPU, else the native CPU.
    ///
    /// A software adapter (llvmpipe, SwiftShader) is used only when it is named: the native CPU is many times faster.
    ///
    /// # Errors
    /// [`ErrorKind::NoDevice`] when the variable names no device, [`ErrorKind::NoDevice`] or [`ErrorKind::Limit`] when
    /// the GPU exists but cannot be opened: no silent fall-back.
    pub fn new() -> Result<Self> {
        wait_for("Device.new", Self::new_async())
    }

    /// [`Device::new`] for programs that may not wait, as in a browser, whose adapter is the one that the browser picks.
    ///
    /// # Errors
    /// As [`Device::new`].
    pub async fn new_async() -> Result<Self> {
        // A value that is no text names no device either.
        match std::env::var_os(VARIABLE) {
            Some(name) if !name.is_empty() => Self::by_name_async(&name.to_string_lossy()).await,
            _ => match adapter::all().await.iter().find(|adapter| adapter::is_hardware(&adapter.info)) {
                Some(adapter) => Ok(Self::with(Backend::Gpu(Gpu::open(adapter).await?))),
                None => Ok(Self::cpu()),
            },
        }
    }

    /// The native CPU: Rust on all cores.
    pub fn cpu() -> Self {
        Self::with(Backend::Native)
    }

    /// `cpu`, a part of an adapter's name (`llvmpipe`), or `backend:part` (`vulkan:llvmpipe`, `gl:`).
    /// Letter case does not count; of several that fit, one of exactly that `backend:name` is taken, else the best.
    ///
    /// # Errors
    /// [`ErrorKind::NoDevice`] with the list of what exists, or that the adapter cannot be opened;
    /// [`ErrorKind::Limit`] when its limits are too small.
    pub fn by_name(name: &str) -> Result<Self> {
        wait_for("Device.by_name", Self::by_name_async(name))
    }

    /// [`Device::by_name`] for programs that may not wait.
    ///
    /// # Errors
    /// As [`Device::by_name`].
    pub async fn by_name_async(name: &str) -> Result<Self> {
        if name.eq_ignore_ascii_case("cpu") {
            return Ok(Self::cpu());
        }
        let adapters = adapter::all().await;
        let full = |adapter: &&Adapter| {
            format!("{}:{}", adapter::backend_name(adapter.info.backend), adapter.info.name).eq_ignore_ascii_case(name)
        };
        let part = |adapter: &&Adapter| adapter::matches(name, &adapter.info);
        match adapters.iter().find(full).or_else(|| adapters.iter().find(part)) {
            Some(adapter) => Ok(Self::with(Backend::Gpu(Gpu::open(adapter).await?))),
            None => {
                let exist = std::iter::once("cpu".to_owned())
                    .chain(adapters.iter().map(|a| format!("{}:{}", adapter::backend_name(a.info.backend), a.info.name)))
                    .collect::<Vec<_>>()
                    .join(", ");
                Err(Error::new(ErrorKind::NoDevice, format!("device: no device is named {name:?}, expected one of: {exist}")))
            }
        }
    }

    /// A device that the application opened itself, to share it with other users of wgpu.
    ///
    /// Its limits must be at least wgpu's defaults: 8 storage buffers a stage, 256 invocations a workgroup. It reports lost
    /// devices and errors to this crate from now on.
    ///
    /// # Errors
    /// [`ErrorKind::Limit`] when the device was requested with limits that are too small.
    pub fn from_wgpu(adapter: &wgpu::Adapter, device: wgpu::Device, queue: wgpu::Queue) -> Result<Self> {
        adapter::check_limits(&adapter::info(adapter).name, &device.limits())?;
        Ok(Self::with(Backend::Gpu(Gpu::from_wgpu(adapter, device, queue))))
    }

    /// Everything that [`Device::by_name`] can open: the native CPU, then all adapters, best first. In a browser, where this call
    /// cannot wait for them, no adapter: [`Device::list_async`] is the way there.
    pub fn list() -> Vec<DeviceInfo> {
        let all = wait_for("Device.list", async { Ok(Self::list_async().await) });
        all.unwrap_or_else(|_| vec![DeviceInfo::native()])
    }

    /// [`Device::list`] for programs that may not wait.
    pub async fn list_async() -> Vec<DeviceInfo> {
        std::iter::once(DeviceInfo::native()).chain(adapter::all().await.iter().map(DeviceInfo::of_adapter)).collect()
    }

    fn with(backend: Backend) -> Self {
        Self {
            inner: Arc::new(Inner {
                backend,
                held: AtomicU64::new(0),
                peak: AtomicU64::new(0),
                batch_invariant: AtomicBool::new(false),
                kernels: Mutex::new(KernelOverride::default()),
                choices: Mutex::new(None),
                #[cfg(feature = "verify")]
                poison: AtomicBool::new(false),
            }),
        }
    }

    /// The same adapter, or the native CPU, as another device: its own memory, kernels and settings; open or lost together.
    #[cfg(feature = "verify")]
    pub(crate) fn again(&self) -> Self {
        Self::with(match self.backend() {
            Backend::Native => Backend::Native,
            Backend::Gpu(gpu) => Backend::Gpu(gpu.again()),
        })
    }

    /// What this device is.
    pub fn info(&self) -> DeviceInfo {
        match self.backend() {
            Backend::Native => DeviceInfo::native(),
            Backend::Gpu(gpu) => DeviceInfo::of_wgpu(&gpu.info, gpu.features(), gpu.limits()),
        }
    }

    /// Whether this is the native CPU.
    pub fn is_cpu(&self) -> bool {
        matches!(self.backend(), Backend::Native)
    }

    /// Hands all queued work to the GPU without waiting for it.
    ///
    /// # Errors
    /// [`ErrorKind::DeviceLost`] or [`ErrorKind::OutOfMemory`], also for work that was queued earlier.
    pub fn submit(&self) -> Result<()> {
        match self.backend() {
            Backend::Native => Ok(()),
            Backend::Gpu(gpu) => gpu.submit(),
        }
    }

    /// Waits until all queued work ran.
    ///
    /// # Errors
    /// As [`Device::submit`].
    pub fn synchronize(&self) -> Result<()> {
        match self.backend() {
            Backend::Native => Ok(()),
            Backend::Gpu(gpu) => gpu.synchronize(),
        }
    }

    /// [`Device::synchronize`] for programs that may not wait, as in a browser. On other targets it waits when it is polled.
    ///
    /// # Errors
    /// As [`Device::submit`].
    pub async fn synchronize_async(&self) -> Result<()> {
        match self.backend() {
            Backend::Native => Ok(()),
            Backend::Gpu(gpu) => gpu.synchronize_async().await,
        }
    }

    /// Runs `work` and all that it queues up, and says which kernels took how long by the GPU's own clock, in the order of their first
    /// launch. Each row of launches of one kernel has a pass of its own then, so that the sum may be more than the work takes by
    /// itself. What other threads queue up meanwhile is counted too.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] on the native CPU, where the adapter has no clock (TIMESTAMP_QUERY), and inside of `work`; those of
    /// `work`; as [`Device::synchronize`].
    pub fn profile(&self, work: impl FnOnce() -> Result<()>) -> Result<Vec<KernelTime>> {
        let Backend::Gpu(gpu) = self.backend() else {
            return Err(Error::unsupported("device.profile", "the native CPU has no clock of kernels"));
        };
        if !gpu.has_clock() {
            return Err(Error::unsupported("device.profile", "the adapter does not offer TIMESTAMP_QUERY"));
        }
        let mut times: Vec<KernelTime> = Vec::new();
        for (kernel, launches, time) in gpu.profile(work)? {
            match times.iter_mut().find(|known| known.kernel == kernel) {
                Some(known) => {
                    known.launches += launches;
                    known.time += time;
                }
                None => times.push(KernelTime { kernel, launches, time }),
            }
        }
        Ok(times)
    }

    /// How many submissions the GPU got from this device so far; 0 on the native CPU.
    pub fn submissions(&self) -> u64 {
        match self.backend() {
            Backend::Native => 0,
            Backend::Gpu(gpu) => gpu.submissions(),
        }
    }

    /// How much memory tensors hold. What a GPU's buffer pool keeps for reuse is not counted.
    pub fn memory(&self) -> MemoryUse {
        MemoryUse { held: self.inner.held.load(Ordering::Relaxed), peak: self.inner.peak.load(Ordering::Relaxed) }
    }

    /// Counts the peak from now on.
    pub fn reset_peak(&self) {
        self.inner.peak.store(self.inner.held.load(Ordering::Relaxed), Ordering::Relaxed);
    }

    /// A tensor takes `bytes`.
    pub(crate) fn hold(&self, bytes: u64) {
        let held = self.inner.held.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.inner.peak.fetch_max(held, Ordering::Relaxed);
    }

    /// A tensor gives them back.
    pub(crate) fn release(&self, bytes: u64) {
        self.inner.held.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// With `true`, from now on, on this device and all clones of it, the bits of an output do not depend on what else is computed
    /// with it: a sequence in steps or in chunks gives the bits of the whole, and a row those that it gives alone, whatever the
    /// batch, its padding and the row's place in it. Every product then sums in one order. Without it the same agrees within
    /// rounding. This holds for outputs and states; gradients agree within rounding in either mode.
    ///
    /// On a GPU it costs the scans over time of cells that have one, the loop over time inside a kernel, and what is chosen by the
    /// number of rows. On the native CPU, whose products sum in one order always, it costs nothing.
    pub fn set_batch_invariant(&self, on: bool) {
        self.inner.batch_invariant.store(on, Ordering::Relaxed);
    }

    /// What [`Device::set_batch_invariant`] set; `false` at first.
    pub fn is_batch_invariant(&self) -> bool {
        self.inner.batch_invariant.load(Ordering::Relaxed)
    }

    /// From now on, on this device and all clones of it, these kernels are used for all that they can do, and those of the tables
    /// in `kernels::choice` for the rest: to test and to tune. Other kernels give other bits: [`Trainer::save`](crate::Trainer::save)
    /// keeps the override, and [`Trainer::load`](crate::Trainer::load) refuses a file that was written under another one.
    ///
    /// ```
    /// # fn main() -> gatefold::Result<()> {
    /// use gatefold::{Device, KernelOverride, SweepKernel};
    /// let device = Device::new()?;
    /// if !device.is_cpu() {
    ///     device.override_kernels(KernelOverride::default().sweep(SweepKernel::Resident))?;
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for a kernel that the adapter cannot run, and on the native CPU, which has nothing to choose.
    pub fn override_kernels(&self, kernels: KernelOverride) -> Result<()> {
        match self.backend() {
            Backend::Native if kernels == KernelOverride::default() => {}
            Backend::Native => {
                let what = format!("{kernels}: the native CPU has no kernels to choose from");
                return Err(Error::unsupported("device.override_kernels", what));
            }
            Backend::Gpu(gpu) => kernels.check(gpu, self)?,
        }
        *self.inner.kernels.lock() = kernels;
        Ok(())
    }

    /// What [`Device::override_kernels`] set; nothing at first.
    pub fn kernel_override(&self) -> KernelOverride {
        *self.inner.kernels.lock()
    }

    /// Runs `work` and says which kernels were chosen for it and why, each choice once, in the order of their first use; nothing on
    /// the native CPU. What other threads choose meanwhile is listed too.
    ///
    /// # Errors
    /// Those of `work`; [`ErrorKind::Unsupported`] inside of it.
    pub fn explain(&self, work: impl FnOnce() -> Result<()>) -> Result<Vec<KernelChoice>> {
        {
            let mut choices = self.inner.choices.lock();
            if choices.is_some() {
                return Err(Error::unsupported("device.explain", "the device explains other work already"));
            }
            *choices = Some(Vec::new());
        }
        /// Takes no more notes, also after a panic.
        struct Notes<'a>(&'a Mutex<Option<Vec<KernelChoice>>>);
        impl Drop for Notes<'_> {
            fn drop(&mut self) {
                self.0.lock().take();
            }
        }
        let notes = Notes(&self.inner.choices);
        work()?;
        Ok(notes.0.lock().take().unwrap_or_default())
    }

    /// Keeps a choice for [`Device::explain`].
    pub(crate) fn note(&self, choice: impl FnOnce() -> KernelChoice) {
        if let Some(choices) = &mut *self.inner.choices.lock() {
            let choice = choice();
            if !choices.contains(&choice) {
                choices.push(choice);
            }
        }
    }

    pub(crate) fn backend(&self) -> &Backend {
        &self.inner.backend
    }

    /// Whether `other` is this device.
    pub(crate) fn same(&self, other: &Device) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }

    /// `op: argument is on ..., expected ...` unless `other` is this device.
    pub(crate) fn expect_same(&self, op: &str, argument: &str, other: &Device) -> Result<()> {
        if self.same(other) {
            return Ok(());
        }
        let (given, expected) = (other.info(), self.info());
        Err(Error::new(ErrorKind::DeviceMismatch, format!("{op}: {argument} is on {given}, expected on {expected}")))
    }

    /// From now on every new tensor starts as NaN, so that a kernel that leaves a hole in its output is seen.
    #[cfg(feature = "verify")]
    pub(crate) fn poison(&self) {
        self.inner.poison.store(true, Ordering::Relaxed);
    }

    #[cfg(feature = "verify")]
    pub(crate) fn is_poisoned(&self) -> bool {
        self.inner.poison.load(Ordering::Relaxed)
    }

    /// Whether workgroups of a grid have given up waiting for each other, as far as readbacks have shown.
    #[cfg(feature = "verify")]
    pub(crate) fn is_alarmed(&self) -> bool {
        matches!(self.backend(), Backend::Gpu(gpu) if gpu.is_alarmed())
    }

    /// Takes that for so, or forgets it, once all recorded work ran.
    #[cfg(feature = "verify")]
    pub(crate) fn set_alarm(&self, is_raised: bool) -> Result<()> {
        match self.backend() {
            Backend::Native => Ok(()),
            Backend::Gpu(gpu) => gpu.set_alarm(is_raised),
        }
    }

    /// Destroys the device under its owner, as a driver reset would: to test what follows.
    #[cfg(feature = "verify")]
    pub fn lose(&self) {
        if let Backend::Gpu(gpu) = self.backend() {
            gpu.lose();
        }
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Device({})", self.info())
    }
}

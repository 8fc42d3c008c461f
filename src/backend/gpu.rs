//! A wgpu device: buffer pool, pipeline cache, and the recorder that turns many launches into one submission.
//!
//! Nothing runs when it is recorded. Launches, copies and uploads queue up in order; [`Gpu::submit`] encodes them
//! into one command buffer. Work in one queue runs in order, so a buffer may go back to the pool as soon as its last
//! owner is gone, even while recorded work still uses it: whoever gets it next is recorded later.

use std::borrow::Cow;
use std::collections::{HashMap, VecDeque};
use std::num::NonZeroU64;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_channel::oneshot;
use parking_lot::{Mutex, MutexGuard};

use super::adapter::{self, Adapter, Class};
use super::clock::Clock;
use super::wait::wait_for;
use super::{Access, Feature, Kernel, without_aliases};
use crate::error::{Error, ErrorKind, Result};

/// Bytes between two uniform structs: the largest alignment of dynamic offsets that WebGPU allows an adapter to ask for.
const UNIFORM_STRIDE: usize = 256;
/// Submissions that may be under way at once: one runs while the next is recorded.
const IN_FLIGHT: usize = 2;
/// A recording is submitted early past this many launches and copies, so that a loop that never reads back stays bounded.
const MAX_COMMANDS: usize = 1 << 18;
/// Uploads are staged in pieces of at most this many bytes in one recording.
const MAX_STAGED: usize = 64 << 20;

/// Device memory; goes back to the pool when dropped.
pub(crate) struct GpuBuffer {
    buffer: wgpu::Buffer,
    pool: Arc<Pool>,
}

impl Drop for GpuBuffer {
    fn drop(&mut self) {
        self.pool.free.lock().entry(self.buffer.size()).or_default().push(self.buffer.clone());
    }
}

/// The text of a shader file, and what stands in its place in the pipelines of this process: to see that tests notice.
#[cfg(feature = "verify")]
pub(crate) static EDITED: std::sync::OnceLock<(String, String)> = std::sync::OnceLock::new();

/// Free buffers by their size in bytes.
#[derive(Default)]
struct Pool {
    free: Mutex<HashMap<u64, Vec<wgpu::Buffer>>>,
}

/// A range of a buffer, in bytes.
#[derive(Clone)]
pub(crate) struct Range {
    buffer: wgpu::Buffer,
    offset: u64,
    size: u64,
}

impl Range {
    pub fn new(buffer: &GpuBuffer, offset: u64, size: u64) -> Self {
        Self { buffer: buffer.buffer.clone(), offset, size }
    }

    /// Bytes of it.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// `size` bytes of it, from `offset` on.
    pub fn part(&self, offset: u64, size: u64) -> Self {
        debug_assert!(offset + size <= self.size);
        Self { buffer: self.buffer.clone(), offset: self.offset + offset, size }
    }
}

/// Launches that share a pipeline and buffers and differ in their uniform struct.
struct Launches {
    pipeline: Arc<Pipeline>,
    bindings: Vec<Range>,
    steps: Vec<(u32, [u32; 3])>,
}

enum Command {
    Launch(Launches),
    /// From the staging bytes at an offset.
    Upload(u64, Range),
    Copy(Range, Range),
    Clear(Range),
}

#[derive(Default)]
struct Recording {
    commands: Vec<Command>,
    count: usize,
    uniforms: Vec<u8>,
    staged: Vec<u8>,
}

struct Pipeline {
    kernel: &'static str,
    pipeline: wgpu::ComputePipeline,
    bind_group: wgpu::BindGroupLayout,
    bindings: &'static [(u32, Access)],
    uniform_size: NonZeroU64,
}

/// The text of an error of the adapter `name`.
fn message(name: &str, what: impl std::fmt::Display) -> String {
    format!("device: {name}: {what}")
}

/// The first failure that wgpu reported outside of a call; everything after it fails with the same words.
type Fault = Arc<Mutex<Option<(ErrorKind, String)>>>;

#[derive(Default)]
struct State {
    recording: Recording,
    /// What `Recording::uniforms` and `staged` are written to; grown when needed.
    uniforms: Option<wgpu::Buffer>,
    staging: Option<wgpu::Buffer>,
    in_flight: VecDeque<wgpu::SubmissionIndex>,
    submissions: u64,
    /// Of each submission, while one is profiled.
    clocks: Option<Vec<Clock>>,
}

/// A kernel's name and the bits of its constants.
type PipelineKey = (&'static str, Vec<u64>);

/// An open wgpu device.
pub(crate) struct Gpu {
    pub info: wgpu::AdapterInfo,
    /// See [`adapter::cooperative_edge`].
    cooperative_edge: Option<u32>,
    limits: wgpu::Limits,
    features: wgpu::Features,
    device: wgpu::Device,
    queue: wgpu::Queue,
    pool: Arc<Pool>,
    pipelines: Arc<Mutex<HashMap<PipelineKey, Arc<Pipeline>>>>,
    state: Mutex<State>,
    fault: Fault,
    exchange: Mutex<Option<GpuBuffer>>,
    exchange_in_use: Mutex<()>,
    alarm: AtomicBool,
    /// Of each kernel that was probed, how many workgroups run at once.
    co_resident: Mutex<HashMap<&'static str, usize>>,
}

impl Gpu {
    pub async fn open(adapter: &Adapter) -> Result<Self> {
        let (device, queue) = adapter::open(adapter).await?;
        Ok(Self::from_wgpu(&adapter.adapter, device, queue))
    }

    pub fn from_wgpu(adapter: &wgpu::Adapter, device: wgpu::Device, queue: wgpu::Queue) -> Self {
        let info = adapter::info(adapter);
        let fault = Fault::default();
        let (lost, failed) = ((fault.clone(), info.name.clone()), (fault.clone(), info.name.clone()));
        device.set_device_lost_callback(move |reason, what| {
            let (fault, name) = &lost;
            let what = format!("the device was lost ({reason:?}): {what}");
            fault.lock().get_or_insert((ErrorKind::DeviceLost, message(name, what)));
        });
        device.on_uncaptured_error(Arc::new(move |error: wgpu::Error| {
            let kind = match error {
                wgpu::Error::OutOfMemory { .. } => ErrorKind::OutOfMemory,
                _ => ErrorKind::DeviceLost,
            };
            let (fault, name) = &failed;
            fault.lock().get_or_insert((kind, message(name, error)));
        }));
        Self::with(info, adapter::cooperative_edge(adapter), device, queue, fault)
    }

    /// The same wgpu device and pipelines, with memory and an exchange of its own.
    #[cfg(feature = "verify")]
    pub fn again(&self) -> Self {
        let (device, queue) = (self.device.clone(), self.queue.clone());
        let again = Self::with(self.info.clone(), self.cooperative_edge, device, queue, self.fault.clone());
        Self { pipelines: self.pipelines.clone(), ..again }
    }

    fn with(
        info: wgpu::AdapterInfo,
        cooperative_edge: Option<u32>,
        device: wgpu::Device,
        queue: wgpu::Queue,
        fault: Fault,
    ) -> Self {
        Self {
            limits: device.limits(),
            features: device.features(),
            cooperative_edge,
            info,
            device,
            queue,
            pool: Arc::default(),
            pipelines: Arc::default(),
            state: Mutex::default(),
            fault,
            exchange: Mutex::default(),
            exchange_in_use: Mutex::default(),
            alarm: AtomicBool::new(false),
            co_resident: Mutex::default(),
        }
    }

    fn fail(&self, kind: ErrorKind, what: impl std::fmt::Display) -> Error {
        Error::new(kind, message(&self.info.name, what))
    }

    fn check(&self) -> Result<()> {
        match &*self.fault.lock() {
            Some((kind, message)) => Err(Error::new(*kind, message.as_str())),
            None => Ok(()),
        }
    }

    /// wgpu panics where a lost device leaves it no other way; here that is an error like any other.
    fn guarded<T>(&self, call: impl FnOnce() -> T) -> Result<T> {
        let outcome = catch_unwind(AssertUnwindSafe(call));
        self.check()?;
        outcome.map_err(|_| self.fail(ErrorKind::DeviceLost, "the device was lost"))
    }

    /// Bytes of the largest buffer that can be made and bound.
    fn largest(&self) -> u64 {
        self.limits.max_storage_buffer_binding_size.min(self.limits.max_buffer_size)
    }

    /// Whether `words` 32-bit words fit in one buffer.
    pub fn fits(&self, words: usize) -> bool {
        (words as u64).saturating_mul(4) <= self.largest()
    }

    /// Memory for `words` 32-bit words, of unspecified content.
    pub fn allocate(&self, words: usize) -> Result<GpuBuffer> {
        self.check()?;
        let bytes = (words as u64).saturating_mul(4);
        if !self.fits(words) {
            let limit = self.largest();
            let what =
                format!("a tensor of {words} elements takes {bytes} bytes, expected at most {limit} (the adapter's limit)");
            return Err(self.fail(ErrorKind::Limit, what));
        }
        let size = size_class(bytes).min(self.limits.max_buffer_size);
        if let Some(buffer) = self.pool.free.lock().get_mut(&size).and_then(Vec::pop) {
            return Ok(GpuBuffer { buffer, pool: self.pool.clone() });
        }
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
        let buffer = self.create(size, usage).or_else(|_| {
            // Free buffers of other sizes may be what is missing.
            self.pool.free.lock().clear();
            self.synchronize()?;
            self.create(size, usage)
        })?;
        Ok(GpuBuffer { buffer, pool: self.pool.clone() })
    }

    /// Memory of `words` words or more through which the workgroups of a launch pass each other results: one for all launches, which
    /// use it in turn. Its first word is the alarm: 0, until a kernel sets it because its workgroups do not run at once. It
    /// stays set, every readback brings it along, and from then on [`Gpu::is_alarmed`].
    pub fn exchange(&self, words: usize) -> Result<Range> {
        let mut exchange = self.exchange.lock();
        let bytes = 4 * words as u64;
        if exchange.as_ref().is_none_or(|buffer| buffer.buffer.size() < bytes) {
            let buffer = self.allocate(words)?;
            let alarm = Range::new(&buffer, 0, 4);
            match &*exchange {
                Some(smaller) => self.copy(Range::new(smaller, 0, 4), alarm)?,
                None => self.clear(alarm)?,
            }
            *exchange = Some(buffer);
        }
        match &*exchange {
            Some(buffer) => Ok(Range::new(buffer, 0, bytes)),
            None => unreachable!("it was just made"),
        }
    }

    /// To be held while launches that use the exchange are recorded: those of two threads must not mix.
    pub fn exchange_in_use(&self) -> MutexGuard<'_, ()> {
        self.exchange_in_use.lock()
    }

    /// Whether a kernel has set the alarm, as far as readbacks have shown.
    pub fn is_alarmed(&self) -> bool {
        self.alarm.load(Ordering::Relaxed)
    }

    /// Raises the alarm, or takes it back, once all recorded work ran.
    #[cfg(feature = "verify")]
    pub fn set_alarm(&self, is_raised: bool) -> Result<()> {
        self.upload(&u32::from(is_raised).to_le_bytes(), self.exchange(1)?)?;
        self.synchronize()?;
        self.alarm.store(is_raised, Ordering::Relaxed);
        Ok(())
    }

    /// How many workgroups of `kernel` run at once: what `probe` finds, the first time.
    pub fn co_resident(&self, kernel: &'static Kernel, probe: impl FnOnce() -> Result<usize>) -> Result<usize> {
        if let Some(count) = self.co_resident.lock().get(kernel.name) {
            return Ok(*count);
        }
        let count = probe()?;
        self.co_resident.lock().insert(kernel.name, count);
        Ok(count)
    }

    fn create(&self, size: u64, usage: wgpu::BufferUsages) -> Result<wgpu::Buffer> {
        let descriptor = wgpu::BufferDescriptor { label: Some("gatefold"), size, usage, mapped_at_creation: false };
        // What a scope found is known later in a browser: there whatever follows fails.
        if cfg!(target_arch = "wasm32") {
            return self.guarded(|| self.device.create_buffer(&descriptor));
        }
        let scope = self.device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        let buffer = self.guarded(|| self.device.create_buffer(&descriptor))?;
        match pollster::block_on(scope.pop()) {
            Some(error) => Err(self
                .fail(ErrorKind::OutOfMemory, format!("no memory for a buffer of {size} bytes: {error}"))
                .with_source(error)),
            None => Ok(buffer),
        }
    }

    /// Records one launch of `kernel`.
    pub fn launch<P: bytemuck::Pod>(
        &self,
        kernel: &'static Kernel,
        params: &P,
        bindings: &[Range],
        groups: [u32; 3],
    ) -> Result<()> {
        self.launch_each(kernel, &[], bindings, std::iter::once((*params, groups)))
    }

    /// Records a launch for each of `steps`, one after another, all on the same buffers. `constants`: values of the shader's
    /// `override`s, by name; each set of values is a pipeline of its own.
    pub fn launch_each<P: bytemuck::Pod>(
        &self,
        kernel: &'static Kernel,
        constants: &[(&'static str, f64)],
        bindings: &[Range],
        steps: impl Iterator<Item = (P, [u32; 3])>,
    ) -> Result<()> {
        self.check()?;
        debug_assert_eq!(size_of::<P>(), kernel.params.size, "{}: params", kernel.name);
        debug_assert!(self.offers(kernel), "{}: features", kernel.name);
        debug_assert_eq!(bindings.len(), kernel.bindings.len(), "{}: bindings", kernel.name);
        let pipeline = self.pipeline(kernel, constants)?;
        let mut state = self.state.lock();
        let uniforms = &mut state.recording.uniforms;
        let steps: Vec<_> = steps
            .map(|(params, groups)| {
                let offset = uniforms.len();
                uniforms.extend_from_slice(bytemuck::bytes_of(&params));
                uniforms.resize(offset + UNIFORM_STRIDE, 0);
                (offset as u32, groups)
            })
            .collect();
        let count = steps.len();
        self.push(&mut state, Command::Launch(Launches { pipeline, bindings: bindings.to_vec(), steps }), count)
    }

    /// Records a copy of `bytes` from the host; a large one is submitted piece by piece.
    pub fn upload(&self, bytes: &[u8], to: Range) -> Result<()> {
        self.check()?;
        let mut state = self.state.lock();
        for (index, piece) in bytes.chunks(MAX_STAGED).enumerate() {
            if state.recording.staged.len() + piece.len() > MAX_STAGED {
                self.submit_locked(&mut state)?;
            }
            let from = state.recording.staged.len() as u64;
            state.recording.staged.extend_from_slice(piece);
            let offset = to.offset + (index * MAX_STAGED) as u64;
            let to = Range { buffer: to.buffer.clone(), offset, size: piece.len() as u64 };
            self.push(&mut state, Command::Upload(from, to), 1)?;
        }
        Ok(())
    }

    /// Records a copy between two buffers.
    pub fn copy(&self, from: Range, to: Range) -> Result<()> {
        self.check()?;
        self.push(&mut self.state.lock(), Command::Copy(from, to), 1)
    }

    /// Records filling a range with zeros.
    pub fn clear(&self, range: Range) -> Result<()> {
        self.check()?;
        self.push(&mut self.state.lock(), Command::Clear(range), 1)
    }

    fn push(&self, state: &mut State, command: Command, count: usize) -> Result<()> {
        state.recording.commands.push(command);
        state.recording.count += count;
        if state.recording.count > MAX_COMMANDS {
            self.submit_locked(state)?;
        }
        Ok(())
    }

    /// Hands all recorded work to the GPU as one submission and does not wait for it, unless two are under way already.
    pub fn submit(&self) -> Result<()> {
        self.submit_locked(&mut self.state.lock())
    }

    /// How many submissions were made so far.
    pub fn submissions(&self) -> u64 {
        self.state.lock().submissions
    }

    fn submit_locked(&self, state: &mut State) -> Result<()> {
        self.check()?;
        if state.recording.commands.is_empty() {
            return Ok(());
        }
        let recording = std::mem::take(&mut state.recording);
        self.submit_recording(state, &recording).inspect_err(|error| {
            // The recorded work is gone: nothing that follows may pretend that it ran.
            self.fault.lock().get_or_insert((error.kind(), error.to_string()));
        })
    }

    fn submit_recording(&self, state: &mut State, recording: &Recording) -> Result<()> {
        let uniform = wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST;
        let uniforms = self.written(&mut state.uniforms, uniform, &recording.uniforms)?;
        let copied = wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
        let staging = self.written(&mut state.staging, copied, &recording.staged)?;
        let clock = state.clocks.as_ref().map(|_| {
            let pass = |command: &Command| match command {
                Command::Launch(launches) => Some((launches.pipeline.kernel, launches.steps.len())),
                _ => None,
            };
            Clock::new(&self.device, recording.commands.iter().filter_map(pass).collect())
        });
        let index = self.guarded(|| {
            let mut encoder = self.device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label: Some("gatefold") });
            self.encode(&mut encoder, &recording.commands, uniforms.as_ref(), staging.as_ref(), clock.as_ref());
            self.queue.submit([encoder.finish()])
        })?;
        state.submissions += 1;
        if let (Some(clocks), Some(clock)) = (&mut state.clocks, clock) {
            clocks.push(clock);
        }
        state.in_flight.push_back(index);
        while state.in_flight.len() > IN_FLIGHT {
            if let Some(oldest) = state.in_flight.pop_front() {
                self.wait(Some(oldest))?;
            }
        }
        Ok(())
    }

    /// Writes `bytes` to the buffer in `slot`, replaced by a larger one where needed; `None` for no bytes.
    ///
    /// The queue orders writes with submissions, so work under way still sees what it was submitted with.
    fn written(&self, slot: &mut Option<wgpu::Buffer>, usage: wgpu::BufferUsages, bytes: &[u8]) -> Result<Option<wgpu::Buffer>> {
        if bytes.is_empty() {
            return Ok(None);
        }
        let size = (bytes.len() as u64).next_power_of_two().max(1 << 16).min(self.limits.max_buffer_size);
        let buffer = match slot.take() {
            Some(buffer) if buffer.size() >= bytes.len() as u64 => buffer,
            _ => self.create(size, usage)?,
        };
        self.guarded(|| self.queue.write_buffer(&buffer, 0, bytes))?;
        *slot = Some(buffer.clone());
        Ok(Some(buffer))
    }

    /// Runs of launches share one compute pass; copies stand between passes. With a clock each launch command has a pass of its own.
    fn encode(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        commands: &[Command],
        uniforms: Option<&wgpu::Buffer>,
        staging: Option<&wgpu::Buffer>,
        clock: Option<&Clock>,
    ) {
        let mut rest = commands.iter().peekable();
        let mut passes = 0;
        while let Some(command) = rest.peek() {
            if matches!(command, Command::Launch(_)) {
                let timestamp_writes = clock.map(|clock| clock.writes(passes));
                passes += 1;
                let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor { label: None, timestamp_writes });
                while let Some(Command::Launch(launches)) = rest.next_if(|command| matches!(command, Command::Launch(_))) {
                    let Some(uniforms) = uniforms else { continue };
                    let group = self.bind(launches, uniforms);
                    pass.set_pipeline(&launches.pipeline.pipeline);
                    for (offset, [x, y, z]) in &launches.steps {
                        pass.set_bind_group(0, &group, &[*offset]);
                        pass.dispatch_workgroups(*x, *y, *z);
                    }
                    if clock.is_some() {
                        break;
                    }
                }
                continue;
            }
            match rest.next() {
                Some(Command::Upload(offset, to)) => {
                    if let Some(staging) = staging {
                        encoder.copy_buffer_to_buffer(staging, *offset, &to.buffer, to.offset, to.size);
                    }
                }
                Some(Command::Copy(from, to)) => {
                    encoder.copy_buffer_to_buffer(&from.buffer, from.offset, &to.buffer, to.offset, to.size);
                }
                Some(Command::Clear(range)) => encoder.clear_buffer(&range.buffer, range.offset, Some(range.size)),
                Some(Command::Launch(_)) | None => {}
            }
        }
        if let Some(clock) = clock {
            clock.resolve(encoder);
        }
    }

    fn bind(&self, launches: &Launches, uniforms: &wgpu::Buffer) -> wgpu::BindGroup {
        let uniform = wgpu::BufferBinding { buffer: uniforms, offset: 0, size: Some(launches.pipeline.uniform_size) };
        let mut entries = vec![wgpu::BindGroupEntry { binding: 0, resource: wgpu::BindingResource::Buffer(uniform) }];
        entries.extend(launches.pipeline.bindings.iter().zip(&launches.bindings).map(|((binding, _), range)| {
            let buffer = wgpu::BufferBinding { buffer: &range.buffer, offset: range.offset, size: NonZeroU64::new(range.size) };
            wgpu::BindGroupEntry { binding: *binding, resource: wgpu::BindingResource::Buffer(buffer) }
        }));
        let layout = &launches.pipeline.bind_group;
        self.device.create_bind_group(&wgpu::BindGroupDescriptor { label: None, layout, entries: &entries })
    }

    /// Whether the device has all that `kernel` asks for.
    pub fn offers(&self, kernel: &Kernel) -> bool {
        kernel.features.iter().all(|feature| self.features.contains(adapter::feature(*feature)))
    }

    /// What the device was opened with; cooperative matrices only where kernels may use them.
    pub fn features(&self) -> wgpu::Features {
        match self.cooperative_edge() {
            Some(_) => self.features,
            None => self.features.difference(wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX),
        }
    }

    pub fn limits(&self) -> &wgpu::Limits {
        &self.limits
    }

    pub fn class(&self) -> Class {
        Class::of(&self.info)
    }

    /// Lanes of every subgroup, where they are of one size and kernels may use them.
    pub fn subgroup_size(&self) -> Option<u32> {
        let (least, most) = (self.info.subgroup_min_size, self.info.subgroup_max_size);
        (self.features.contains(wgpu::Features::SUBGROUP) && least == most).then_some(least)
    }

    /// Rows and columns of the cooperative matrices that kernels may use, if any.
    pub fn cooperative_edge(&self) -> Option<u32> {
        self.cooperative_edge.filter(|_| self.features.contains(adapter::feature(Feature::CooperativeMatrices)))
    }

    /// Bytes of a workgroup's memory.
    pub fn workgroup_memory(&self) -> u32 {
        self.limits.max_compute_workgroup_storage_size
    }

    /// Builds the pipeline of `kernel` with these constants once.
    fn pipeline(&self, kernel: &'static Kernel, constants: &[(&'static str, f64)]) -> Result<Arc<Pipeline>> {
        let key = (kernel.name, constants.iter().map(|(_, value)| value.to_bits()).collect());
        if let Some(pipeline) = self.pipelines.lock().get(&key) {
            return Ok(pipeline.clone());
        }
        let uniform_size = NonZeroU64::new(kernel.params.size as u64)
            .ok_or_else(|| self.fail(ErrorKind::DeviceLost, format!("{}: empty params", kernel.name)))?;
        let pipeline = self.guarded(|| self.build(kernel, constants, uniform_size))?;
        let pipeline = Arc::new(pipeline);
        self.pipelines.lock().insert(key, pipeline.clone());
        Ok(pipeline)
    }

    fn build(&self, kernel: &'static Kernel, constants: &[(&'static str, f64)], uniform_size: NonZeroU64) -> Pipeline {
        let label = Some(kernel.name);
        let entry = |binding, ty, has_dynamic_offset, min_binding_size| wgpu::BindGroupLayoutEntry {
            binding,
            visibility: wgpu::ShaderStages::COMPUTE,
            ty: wgpu::BindingType::Buffer { ty, has_dynamic_offset, min_binding_size },
            count: None,
        };
        let mut entries = vec![entry(0, wgpu::BufferBindingType::Uniform, true, Some(uniform_size))];
        entries.extend(kernel.bindings.iter().map(|(binding, access)| {
            entry(*binding, wgpu::BufferBindingType::Storage { read_only: *access == Access::Read }, false, None)
        }));
        let bind_group = self.device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label, entries: &entries });
        let layout = self.device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label,
            bind_group_layouts: &[Some(&bind_group)],
            ..Default::default()
        });
        let (text, checks) = (Cow::from(kernel.source), wgpu::ShaderRuntimeChecks::unchecked());
        #[cfg(feature = "verify")]
        let (text, checks) = match EDITED.get() {
            Some((original, edited)) => (text.replace(original, edited).into(), wgpu::ShaderRuntimeChecks::checked()),
            None => (text, checks),
        };
        let source = wgpu::ShaderModuleDescriptor { label, source: wgpu::ShaderSource::Wgsl(without_aliases(&text).into()) };
        // SAFETY: shaders that run unchecked are this crate's own. Each guards its indices with the sizes in its uniform struct, which
        // the host side checked against the bound ranges; every loop is bounded by one of those sizes or by a
        // constant.
        let module = unsafe { self.device.create_shader_module_trusted(source, checks) };
        let pipeline = self.device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label,
            layout: Some(&layout),
            module: &module,
            entry_point: Some(kernel.entry),
            // Zeroing would cost a store and a barrier; no shader reads workgroup memory that it did not write.
            compilation_options: wgpu::PipelineCompilationOptions { constants, zero_initialize_workgroup_memory: false },
            cache: None,
        });
        Pipeline { kernel: kernel.name, pipeline, bind_group, bindings: kernel.bindings, uniform_size }
    }

    fn wait(&self, submission: Option<wgpu::SubmissionIndex>) -> Result<()> {
        let poll = wgpu::PollType::Wait { submission_index: submission, timeout: None };
        self.guarded(|| self.device.poll(poll))?
            .map(|_| ())
            .map_err(|error| self.fail(ErrorKind::DeviceLost, format!("waiting failed: {error}")).with_source(error))
    }

    /// Submits what is recorded and waits until all of it ran.
    pub fn synchronize(&self) -> Result<()> {
        wait_for("Device.synchronize", self.synchronize_async())
    }

    /// The same, where the caller may not wait.
    pub async fn synchronize_async(&self) -> Result<()> {
        {
            let mut state = self.state.lock();
            self.submit_locked(&mut state)?;
            state.in_flight.clear();
        }
        let (done, is_done) = oneshot::channel();
        self.queue.on_submitted_work_done(move || _ = done.send(()));
        self.told(is_done).await
    }

    /// What a callback of wgpu sends, once all submitted work ran: a browser calls back by itself, natively it takes somebody's wait,
    /// which may be another thread's.
    async fn told<T>(&self, receiver: oneshot::Receiver<T>) -> Result<T> {
        if cfg!(not(target_arch = "wasm32")) {
            self.wait(None)?;
        }
        let told = receiver.await.ok();
        self.check()?;
        told.ok_or_else(|| self.fail(ErrorKind::DeviceLost, "work was submitted, and nothing was heard of its end"))
    }

    /// Whether [`Gpu::profile`] works.
    pub fn has_clock(&self) -> bool {
        self.features.contains(wgpu::Features::TIMESTAMP_QUERY)
    }

    /// Runs `work` and what it records, one pass a launch command: the kernel, the launches and the time of each.
    pub fn profile(&self, work: impl FnOnce() -> Result<()>) -> Result<Vec<(&'static str, usize, Duration)>> {
        /// Stops the clocks, also where `work` panics.
        struct Running<'a>(&'a Gpu);
        impl Drop for Running<'_> {
            fn drop(&mut self) {
                self.0.state.lock().clocks = None;
            }
        }
        self.synchronize()?;
        let mut state = self.state.lock();
        if state.clocks.is_some() {
            return Err(Error::unsupported("device.profile", "a profile is being taken already"));
        }
        state.clocks = Some(Vec::new());
        drop(state);
        let running = Running(self);
        work()?;
        self.synchronize()?;
        let clocks = self.state.lock().clocks.take().unwrap_or_default();
        drop(running);
        let mut times = Vec::new();
        for clock in clocks {
            let (buffer, size) = (clock.resolved.clone(), clock.resolved.size());
            times.extend(clock.times(&self.read(Range { buffer, offset: 0, size })?, self.queue.get_timestamp_period()));
        }
        Ok(times)
    }

    /// The content of `range`, after all recorded work; the alarm of the exchange comes along.
    pub fn read(&self, range: Range) -> Result<Vec<u8>> {
        wait_for("reading back", self.read_async(range))
    }

    /// The same, where the caller may not wait.
    pub async fn read_async(&self, range: Range) -> Result<Vec<u8>> {
        self.check()?;
        let usage = wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST;
        let size = range.size;
        let mapped = self.create(size + 4, usage)?;
        let to = |offset, size| Range { buffer: mapped.clone(), offset, size };
        self.copy(range, to(0, size))?;
        let alarm = self.exchange.lock().as_ref().map(|buffer| Range::new(buffer, 0, 4));
        let has_alarm = alarm.is_some();
        if let Some(alarm) = alarm {
            self.copy(alarm, to(size, 4))?;
        }
        self.submit()?;
        let (done, is_done) = oneshot::channel();
        mapped.map_async(wgpu::MapMode::Read, .., move |outcome| _ = done.send(outcome));
        let failed = |error: &dyn std::fmt::Display| self.fail(ErrorKind::DeviceLost, format!("reading back failed: {error}"));
        self.told(is_done).await?.map_err(|error| failed(&error))?;
        let mut bytes =
            self.guarded(|| mapped.get_mapped_range(..).map(|view| view.to_vec()))?.map_err(|error| failed(&error))?;
        mapped.unmap();
        let alarm = bytes.split_off(size as usize);
        if has_alarm && alarm.iter().any(|byte| *byte != 0) {
            self.alarm.store(true, Ordering::Relaxed);
        }
        Ok(bytes)
    }

    /// Makes the device unusable, as a driver reset would.
    #[cfg(feature = "verify")]
    pub fn lose(&self) {
        self.device.destroy();
    }
}

/// The size of buffer that serves `bytes`: an eighth of an octave apart, so that at most 12% is wasted.
fn size_class(bytes: u64) -> u64 {
    let bytes = bytes.max(256);
    let step = (bytes.next_power_of_two() / 16).max(256);
    bytes.div_ceil(step) * step
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn size_classes_hold_their_bytes_and_waste_little() {
        for bytes in (1..4096).chain([65_537, 1 << 20, (1 << 20) + 1, 100_000_001]) {
            let size = size_class(bytes);
            assert!(size >= bytes && size.is_multiple_of(256) && size == size_class(size), "{bytes}: {size}");
            assert!(size <= bytes.max(4096) + bytes.max(4096) / 8, "{bytes}: {size}");
        }
    }
}

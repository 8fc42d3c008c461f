//! The compute part of wgpu over host memory: what [`msl`](crate::msl) compiled runs when it is submitted.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::fmt;
use std::future::ready;
use std::ops::Range;
use std::pin::Pin;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use naga::valid::{Capabilities, ModuleInfo, ShaderStages, SubgroupOperationSet, ValidationFlags, Validator};
use wgpu::custom::*;

use crate::msl::{Bound, Options, Program, Stage};

/// As wgpu's Metal backend has it on Apple's GPUs, as far as compute is concerned, but for the largest buffer.
fn limits() -> wgpu::Limits {
    wgpu::Limits {
        max_storage_buffers_per_shader_stage: 29,
        max_uniform_buffers_per_shader_stage: 29,
        max_compute_workgroup_storage_size: 32 << 10,
        max_compute_invocations_per_workgroup: 1024,
        max_compute_workgroup_size_x: 1024,
        max_compute_workgroup_size_y: 1024,
        max_compute_workgroup_size_z: 1024,
        max_compute_workgroups_per_dimension: 65_535,
        max_buffer_size: 1 << 30,
        max_storage_buffer_binding_size: 1 << 30,
        max_uniform_buffer_binding_size: 1 << 30,
        min_storage_buffer_offset_alignment: 32,
        min_uniform_buffer_offset_alignment: 32,
        ..wgpu::Limits::default()
    }
}

/// Takes a lock, also after a panic of its last owner.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// For what only drawing, textures, queries or indirect launches need.
macro_rules! beyond_compute {
    ($($call:ident),+) => { unimplemented!(concat!("this device computes only: ", $(stringify!($call)),+)) };
}

/// What goes for all parts of a device.
struct Shared {
    options: Options,
    adapter: wgpu::AdapterInfo,
    on_error: Mutex<Option<Arc<dyn wgpu::UncapturedErrorHandler>>>,
    on_loss: Mutex<Option<BoxDeviceLostCallback>>,
    scopes: AtomicU32,
    /// Launches so far: each has its own order of threads.
    launches: AtomicU32,
    submissions: AtomicU64,
    /// One submission at a time.
    queue: Mutex<()>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.adapter.name)
    }
}

impl Shared {
    fn fail(&self, what: String) {
        let handler = lock(&self.on_error).clone();
        let error = wgpu::Error::Internal { source: what.clone().into(), description: what };
        match handler {
            Some(handler) => handler(error),
            None => panic!("{error}"),
        }
    }
}

/// The adapter and the device of it.
pub fn open(options: Options) -> (wgpu::Adapter, wgpu::Device, wgpu::Queue) {
    let mut info = wgpu::AdapterInfo::new(wgpu::DeviceType::IntegratedGpu, wgpu::Backend::Metal);
    info.name = "Metal's shaders compiled for the CPU".to_owned();
    info.driver = "naga's MSL".to_owned();
    info.subgroup_min_size = options.simd;
    info.subgroup_max_size = options.simd;
    let shared = Arc::new(Shared {
        options,
        adapter: info,
        on_error: Mutex::default(),
        on_loss: Mutex::default(),
        scopes: AtomicU32::new(0),
        launches: AtomicU32::new(0),
        submissions: AtomicU64::new(0),
        queue: Mutex::default(),
    });
    let adapter = wgpu::Adapter::from_custom(Adapter(shared.clone()));
    (adapter, wgpu::Device::from_custom(Device(shared.clone())), wgpu::Queue::from_custom(Queue(shared)))
}

#[derive(Debug)]
struct Adapter(Arc<Shared>);

impl AdapterInterface for Adapter {
    fn request_device(&self, _: &wgpu::DeviceDescriptor<'_>) -> Pin<Box<dyn RequestDeviceFuture>> {
        let (device, queue) = (Device(self.0.clone()), Queue(self.0.clone()));
        Box::pin(ready(Ok((DispatchDevice::custom(device), DispatchQueue::custom(queue)))))
    }

    fn is_surface_supported(&self, _: &DispatchSurface) -> bool {
        false
    }

    fn features(&self) -> wgpu::Features {
        wgpu::Features::SUBGROUP
    }

    fn limits(&self) -> wgpu::Limits {
        limits()
    }

    fn downlevel_capabilities(&self) -> wgpu::DownlevelCapabilities {
        wgpu::DownlevelCapabilities::default()
    }

    fn get_info(&self) -> wgpu::AdapterInfo {
        self.0.adapter.clone()
    }

    fn get_texture_format_features(&self, _: wgpu::TextureFormat) -> wgpu::TextureFormatFeatures {
        beyond_compute!(get_texture_format_features)
    }

    fn get_presentation_timestamp(&self) -> wgpu::PresentationTimestamp {
        wgpu::PresentationTimestamp::INVALID_TIMESTAMP
    }

    fn cooperative_matrix_properties(&self) -> Vec<wgpu::wgt::CooperativeMatrixProperties> {
        Vec::new()
    }
}

#[derive(Debug)]
struct Device(Arc<Shared>);

impl DeviceInterface for Device {
    fn features(&self) -> wgpu::Features {
        wgpu::Features::SUBGROUP
    }

    fn limits(&self) -> wgpu::Limits {
        limits()
    }

    fn adapter_info(&self) -> wgpu::AdapterInfo {
        self.0.adapter.clone()
    }

    fn create_shader_module(
        &self,
        descriptor: wgpu::ShaderModuleDescriptor<'_>,
        checks: wgpu::ShaderRuntimeChecks,
    ) -> DispatchShaderModule {
        let wgpu::ShaderSource::Wgsl(source) = descriptor.source else { beyond_compute!(create_shader_module) };
        let parsed = naga::front::wgsl::parse_str(&source).map_err(|error| error.emit_to_string(&source)).and_then(|module| {
            // What SUBGROUP stands for, and what every Mac has.
            let capabilities = Capabilities::SUBGROUP | Capabilities::SHADER_FLOAT16_IN_FLOAT32;
            let mut validator = Validator::new(ValidationFlags::all(), capabilities);
            validator.subgroup_stages(ShaderStages::COMPUTE).subgroup_operations(SubgroupOperationSet::all());
            let info = validator.validate(&module).map_err(|error| error.emit_to_string(&source))?;
            Ok((module, info))
        });
        let parsed = parsed.map_err(|error| self.0.fail(error)).ok();
        DispatchShaderModule::custom(ShaderModule { parsed: Arc::new(parsed), checks })
    }

    unsafe fn create_shader_module_passthrough(&self, _: &wgpu::ShaderModuleDescriptorPassthrough<'_>) -> DispatchShaderModule {
        beyond_compute!(create_shader_module_passthrough)
    }

    fn create_bind_group_layout(&self, descriptor: &wgpu::BindGroupLayoutDescriptor<'_>) -> DispatchBindGroupLayout {
        DispatchBindGroupLayout::custom(BindGroupLayout(Arc::from(descriptor.entries)))
    }

    fn create_bind_group(&self, descriptor: &wgpu::BindGroupDescriptor<'_>) -> DispatchBindGroup {
        let layout = custom::<BindGroupLayout>(descriptor.layout.as_custom());
        let range = |entry: &wgpu::BindGroupEntry<'_>| {
            let wgpu::BindingResource::Buffer(binding) = &entry.resource else { beyond_compute!(create_bind_group) };
            let memory = custom::<Buffer>(binding.buffer.as_custom()).0.clone();
            let bytes = binding.size.map_or(memory.layout.size() as u64 - binding.offset, u64::from);
            assert!(binding.offset + bytes <= memory.layout.size() as u64, "a binding beyond its buffer");
            let is_dynamic = layout.0.iter().any(|of| {
                of.binding == entry.binding && matches!(of.ty, wgpu::BindingType::Buffer { has_dynamic_offset: true, .. })
            });
            Binding { binding: entry.binding, memory, offset: binding.offset, bytes, is_dynamic }
        };
        DispatchBindGroup::custom(BindGroup(descriptor.entries.iter().map(range).collect()))
    }

    fn create_pipeline_layout(&self, descriptor: &wgpu::PipelineLayoutDescriptor<'_>) -> DispatchPipelineLayout {
        let [Some(group)] = descriptor.bind_group_layouts else {
            beyond_compute!(create_pipeline_layout, with, other, than, one, group)
        };
        DispatchPipelineLayout::custom(PipelineLayout(custom::<BindGroupLayout>(group.as_custom()).clone()))
    }

    fn create_render_pipeline(&self, _: &wgpu::RenderPipelineDescriptor<'_>) -> DispatchRenderPipeline {
        beyond_compute!(create_render_pipeline)
    }

    fn create_mesh_pipeline(&self, _: &wgpu::MeshPipelineDescriptor<'_>) -> DispatchRenderPipeline {
        beyond_compute!(create_mesh_pipeline)
    }

    fn create_compute_pipeline(&self, descriptor: &wgpu::ComputePipelineDescriptor<'_>) -> DispatchComputePipeline {
        let (Some(layout), Some(entry)) = (descriptor.layout, descriptor.entry_point) else {
            beyond_compute!(create_compute_pipeline, without, layout, or, entry, point)
        };
        let layout = &custom::<PipelineLayout>(layout.as_custom()).0;
        let module = custom::<ShaderModule>(descriptor.module.as_custom());
        let name = descriptor.label.unwrap_or(entry).to_owned();
        let program = (*module.parsed).as_ref().and_then(|(parsed, info)| {
            let bindings: Vec<(u32, bool)> = layout.0.iter().map(|entry| (entry.binding, is_written(entry))).collect();
            let stage = Stage {
                module: parsed,
                info,
                entry,
                constants: descriptor.compilation_options.constants,
                zero_workgroup_memory: descriptor.compilation_options.zero_initialize_workgroup_memory,
                checks: module.checks,
                bindings: &bindings,
            };
            Program::new(&stage, &self.0.options).map_err(|error| self.0.fail(format!("{name}: {error:#}"))).ok()
        });
        DispatchComputePipeline::custom(ComputePipeline { layout: layout.clone(), name, program: program.map(Arc::new) })
    }

    unsafe fn create_pipeline_cache(&self, _: &wgpu::PipelineCacheDescriptor<'_>) -> DispatchPipelineCache {
        beyond_compute!(create_pipeline_cache)
    }

    fn create_buffer(&self, descriptor: &wgpu::BufferDescriptor<'_>) -> DispatchBuffer {
        DispatchBuffer::custom(Buffer(Arc::new(Memory::new(descriptor.size as usize))))
    }

    fn create_texture(&self, _: &wgpu::TextureDescriptor<'_>) -> DispatchTexture {
        beyond_compute!(create_texture)
    }

    fn create_external_texture(
        &self,
        _: &wgpu::ExternalTextureDescriptor<'_>,
        _: &[&wgpu::TextureView],
    ) -> DispatchExternalTexture {
        beyond_compute!(create_external_texture)
    }

    fn create_blas(
        &self,
        _: &wgpu::CreateBlasDescriptor<'_>,
        _: wgpu::BlasGeometrySizeDescriptors,
    ) -> (Option<u64>, DispatchBlas) {
        beyond_compute!(create_blas)
    }

    fn create_tlas(&self, _: &wgpu::CreateTlasDescriptor<'_>) -> DispatchTlas {
        beyond_compute!(create_tlas)
    }

    fn create_sampler(&self, _: &wgpu::SamplerDescriptor<'_>) -> DispatchSampler {
        beyond_compute!(create_sampler)
    }

    fn create_query_set(&self, _: &wgpu::QuerySetDescriptor<'_>) -> DispatchQuerySet {
        beyond_compute!(create_query_set)
    }

    fn create_command_encoder(&self, _: &wgpu::CommandEncoderDescriptor<'_>) -> DispatchCommandEncoder {
        DispatchCommandEncoder::custom(CommandEncoder::default())
    }

    fn create_render_bundle_encoder(&self, _: &wgpu::RenderBundleEncoderDescriptor<'_>) -> DispatchRenderBundleEncoder {
        beyond_compute!(create_render_bundle_encoder)
    }

    fn set_device_lost_callback(&self, callback: BoxDeviceLostCallback) {
        *lock(&self.0.on_loss) = Some(callback);
    }

    fn on_uncaptured_error(&self, handler: Arc<dyn wgpu::UncapturedErrorHandler>) {
        *lock(&self.0.on_error) = Some(handler);
    }

    /// No error is ever captured: a scope sees nothing, and the handler all.
    fn push_error_scope(&self, _: wgpu::ErrorFilter) -> u32 {
        self.0.scopes.fetch_add(1, Ordering::Relaxed)
    }

    fn pop_error_scope(&self, _: u32) -> Pin<Box<dyn PopErrorScopeFuture>> {
        self.0.scopes.fetch_sub(1, Ordering::Relaxed);
        Box::pin(ready(None))
    }

    unsafe fn start_graphics_debugger_capture(&self) {}

    unsafe fn stop_graphics_debugger_capture(&self) {}

    /// Work is done when it was submitted.
    fn poll(&self, _: wgpu::wgt::PollType<u64>) -> Result<wgpu::PollStatus, wgpu::PollError> {
        Ok(wgpu::PollStatus::QueueEmpty)
    }

    fn get_internal_counters(&self) -> wgpu::InternalCounters {
        wgpu::InternalCounters::default()
    }

    fn generate_allocator_report(&self) -> Option<wgpu::AllocatorReport> {
        None
    }

    fn destroy(&self) {
        if let Some(callback) = lock(&self.0.on_loss).take() {
            callback(wgpu::DeviceLostReason::Destroyed, "it was destroyed".to_owned());
        }
    }
}

/// What lies behind one of wgpu's handles. All are of one device, so it is of this crate.
fn custom<T>(of_this_device: Option<&T>) -> &T {
    of_this_device.expect("a handle of another device")
}

fn is_written(entry: &wgpu::BindGroupLayoutEntry) -> bool {
    let wgpu::BindingType::Buffer { ty, .. } = entry.ty else { beyond_compute!(a, binding, that, is, no, buffer) };
    matches!(ty, wgpu::BufferBindingType::Storage { read_only: false })
}

#[derive(Debug)]
struct ShaderModule {
    /// `None` where it is not valid.
    parsed: Arc<Option<(naga::Module, ModuleInfo)>>,
    checks: wgpu::ShaderRuntimeChecks,
}

impl ShaderModuleInterface for ShaderModule {
    fn get_compilation_info(&self) -> Pin<Box<dyn ShaderCompilationInfoFuture>> {
        Box::pin(ready(wgpu::CompilationInfo { messages: Vec::new() }))
    }
}

#[derive(Clone, Debug)]
struct BindGroupLayout(Arc<[wgpu::BindGroupLayoutEntry]>);

impl BindGroupLayoutInterface for BindGroupLayout {}

#[derive(Debug)]
struct PipelineLayout(BindGroupLayout);

impl PipelineLayoutInterface for PipelineLayout {}

#[derive(Clone, Debug)]
struct Binding {
    binding: u32,
    memory: Arc<Memory>,
    offset: u64,
    bytes: u64,
    is_dynamic: bool,
}

#[derive(Clone, Debug)]
struct BindGroup(Vec<Binding>);

impl BindGroupInterface for BindGroup {}

#[derive(Clone)]
struct ComputePipeline {
    layout: BindGroupLayout,
    name: String,
    /// `None` where an error was reported.
    program: Option<Arc<Program>>,
}

impl fmt::Debug for ComputePipeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

impl ComputePipelineInterface for ComputePipeline {
    fn get_bind_group_layout(&self, _: u32) -> DispatchBindGroupLayout {
        DispatchBindGroupLayout::custom(self.layout.clone())
    }
}

/// A buffer's bytes. Commands use them one after another in `Queue::submit`; the threads of a launch use them at once, as on a GPU.
#[derive(Debug)]
struct Memory {
    data: NonNull<u8>,
    layout: Layout,
}

// SAFETY: all access is by raw pointers, in an order that the queue's lock and the rules of mapping give.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    fn new(bytes: usize) -> Self {
        let layout = Layout::from_size_align(bytes.max(16), 256).expect("a size below the largest buffer");
        // SAFETY: the layout is not empty.
        let data = NonNull::new(unsafe { alloc_zeroed(layout) }).unwrap_or_else(|| std::alloc::handle_alloc_error(layout));
        Self { data, layout }
    }

    /// Where `bytes` bytes from `offset` on lie.
    fn at(&self, offset: u64, bytes: u64) -> *mut u8 {
        assert!(offset + bytes <= self.layout.size() as u64, "{bytes} bytes at {offset} of a buffer of {}", self.layout.size());
        // SAFETY: within the allocation.
        unsafe { self.data.as_ptr().add(offset as usize) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: it was allocated with this layout.
        unsafe { dealloc(self.data.as_ptr(), self.layout) }
    }
}

#[derive(Debug)]
struct Buffer(Arc<Memory>);

impl BufferInterface for Buffer {
    fn map_async(&self, _: wgpu::MapMode, _: Range<wgpu::BufferAddress>, callback: BufferMapCallback) {
        callback(Ok(()));
    }

    fn get_mapped_range(&self, range: Range<wgpu::BufferAddress>) -> Result<DispatchBufferMappedRange, wgpu::MapRangeError> {
        Ok(DispatchBufferMappedRange::custom(Mapped {
            memory: self.0.clone(),
            offset: range.start,
            bytes: range.end - range.start,
        }))
    }

    fn unmap(&self) {}

    fn destroy(&self) {}
}

#[derive(Debug)]
struct Mapped {
    memory: Arc<Memory>,
    offset: u64,
    bytes: u64,
}

impl BufferMappedRangeInterface for Mapped {
    fn len(&self) -> usize {
        self.bytes as usize
    }

    unsafe fn read_slice(&self) -> &[u8] {
        // SAFETY: while it is mapped, no command uses it.
        unsafe { std::slice::from_raw_parts(self.memory.at(self.offset, self.bytes), self.bytes as usize) }
    }

    unsafe fn write_slice(&mut self) -> wgpu::WriteOnly<'_, [u8]> {
        // SAFETY: as above, and wgpu hands out no two ranges that overlap.
        wgpu::WriteOnly::from_mut(unsafe {
            std::slice::from_raw_parts_mut(self.memory.at(self.offset, self.bytes), self.bytes as usize)
        })
    }
}

#[derive(Debug)]
enum Command {
    Copy { from: Arc<Memory>, from_offset: u64, to: Arc<Memory>, to_offset: u64, bytes: u64 },
    Clear { memory: Arc<Memory>, offset: u64, bytes: u64 },
    Launch { pipeline: ComputePipeline, bindings: Vec<Binding>, threadgroups: [u32; 3] },
}

#[derive(Debug, Default)]
struct CommandEncoder(Arc<Mutex<Vec<Command>>>);

impl CommandEncoderInterface for CommandEncoder {
    fn copy_buffer_to_buffer(
        &self,
        source: &DispatchBuffer,
        source_offset: wgpu::BufferAddress,
        destination: &DispatchBuffer,
        destination_offset: wgpu::BufferAddress,
        copy_size: Option<wgpu::BufferAddress>,
    ) {
        let [from, to] = [source, destination].map(|buffer| custom::<Buffer>(buffer.as_custom()).0.clone());
        let bytes = copy_size.unwrap_or(from.layout.size() as u64 - source_offset);
        lock(&self.0).push(Command::Copy { from, from_offset: source_offset, to, to_offset: destination_offset, bytes });
    }

    fn copy_buffer_to_texture(&self, _: wgpu::TexelCopyBufferInfo<'_>, _: wgpu::TexelCopyTextureInfo<'_>, _: wgpu::Extent3d) {
        beyond_compute!(copy_buffer_to_texture)
    }

    fn copy_texture_to_buffer(&self, _: wgpu::TexelCopyTextureInfo<'_>, _: wgpu::TexelCopyBufferInfo<'_>, _: wgpu::Extent3d) {
        beyond_compute!(copy_texture_to_buffer)
    }

    fn copy_texture_to_texture(&self, _: wgpu::TexelCopyTextureInfo<'_>, _: wgpu::TexelCopyTextureInfo<'_>, _: wgpu::Extent3d) {
        beyond_compute!(copy_texture_to_texture)
    }

    fn begin_compute_pass(&self, _: &wgpu::ComputePassDescriptor<'_>) -> DispatchComputePass {
        DispatchComputePass::custom(ComputePass { commands: self.0.clone(), pipeline: None, bindings: Vec::new() })
    }

    fn begin_render_pass(&self, _: &wgpu::RenderPassDescriptor<'_>) -> DispatchRenderPass {
        beyond_compute!(begin_render_pass)
    }

    fn finish(&mut self) -> DispatchCommandBuffer {
        DispatchCommandBuffer::custom(CommandBuffer(std::mem::take(&mut *lock(&self.0))))
    }

    fn clear_texture(&self, _: &DispatchTexture, _: &wgpu::ImageSubresourceRange) {
        beyond_compute!(clear_texture)
    }

    fn clear_buffer(&self, buffer: &DispatchBuffer, offset: wgpu::BufferAddress, size: Option<wgpu::BufferAddress>) {
        let memory = custom::<Buffer>(buffer.as_custom()).0.clone();
        let bytes = size.unwrap_or(memory.layout.size() as u64 - offset);
        lock(&self.0).push(Command::Clear { memory, offset, bytes });
    }

    fn insert_debug_marker(&self, _: &str) {}

    fn push_debug_group(&self, _: &str) {}

    fn pop_debug_group(&self) {}

    fn write_timestamp(&self, _: &DispatchQuerySet, _: u32) {
        beyond_compute!(write_timestamp)
    }

    fn resolve_query_set(&self, _: &DispatchQuerySet, _: u32, _: u32, _: &DispatchBuffer, _: wgpu::BufferAddress) {
        beyond_compute!(resolve_query_set)
    }

    fn mark_acceleration_structures_built<'a>(
        &self,
        _: &mut dyn Iterator<Item = &'a wgpu::Blas>,
        _: &mut dyn Iterator<Item = &'a wgpu::Tlas>,
    ) {
        beyond_compute!(mark_acceleration_structures_built)
    }

    fn build_acceleration_structures<'a>(
        &self,
        _: &mut dyn Iterator<Item = &'a wgpu::BlasBuildEntry<'a>>,
        _: &mut dyn Iterator<Item = &'a wgpu::Tlas>,
    ) {
        beyond_compute!(build_acceleration_structures)
    }

    fn transition_resources<'a>(
        &mut self,
        _: &mut dyn Iterator<Item = wgpu::wgt::BufferTransition<&'a DispatchBuffer>>,
        _: &mut dyn Iterator<Item = wgpu::wgt::TextureTransition<&'a DispatchTexture>>,
    ) {
    }
}

#[derive(Debug)]
struct ComputePass {
    commands: Arc<Mutex<Vec<Command>>>,
    pipeline: Option<ComputePipeline>,
    bindings: Vec<Binding>,
}

impl Drop for ComputePass {
    /// Its launches are in the encoder already.
    fn drop(&mut self) {}
}

impl ComputePassInterface for ComputePass {
    fn set_pipeline(&mut self, pipeline: &DispatchComputePipeline) {
        self.pipeline = Some(custom::<ComputePipeline>(pipeline.as_custom()).clone());
    }

    fn set_bind_group(&mut self, index: u32, group: Option<&DispatchBindGroup>, offsets: &[wgpu::DynamicOffset]) {
        let (0, Some(group)) = (index, group) else { beyond_compute!(set_bind_group, of, other, than, group, zero) };
        self.bindings.clone_from(&custom::<BindGroup>(group.as_custom()).0);
        for (binding, offset) in self.bindings.iter_mut().filter(|binding| binding.is_dynamic).zip(offsets) {
            binding.offset += u64::from(*offset);
        }
    }

    fn set_immediates(&mut self, _: u32, _: &[u8]) {
        beyond_compute!(set_immediates)
    }

    fn insert_debug_marker(&mut self, _: &str) {}

    fn push_debug_group(&mut self, _: &str) {}

    fn pop_debug_group(&mut self) {}

    fn write_timestamp(&mut self, _: &DispatchQuerySet, _: u32) {
        beyond_compute!(write_timestamp)
    }

    fn begin_pipeline_statistics_query(&mut self, _: &DispatchQuerySet, _: u32) {
        beyond_compute!(begin_pipeline_statistics_query)
    }

    fn end_pipeline_statistics_query(&mut self) {
        beyond_compute!(end_pipeline_statistics_query)
    }

    fn dispatch_workgroups(&mut self, x: u32, y: u32, z: u32) {
        let pipeline = self.pipeline.clone().expect("a pipeline is set before a launch");
        lock(&self.commands).push(Command::Launch { pipeline, bindings: self.bindings.clone(), threadgroups: [x, y, z] });
    }

    fn dispatch_workgroups_indirect(&mut self, _: &DispatchBuffer, _: wgpu::BufferAddress) {
        beyond_compute!(dispatch_workgroups_indirect)
    }

    fn transition_resources<'a>(
        &mut self,
        _: &mut dyn Iterator<Item = wgpu::wgt::BufferTransition<&'a DispatchBuffer>>,
        _: &mut dyn Iterator<Item = wgpu::wgt::TextureTransition<&'a DispatchTextureView>>,
    ) {
    }
}

#[derive(Debug)]
struct CommandBuffer(Vec<Command>);

impl CommandBufferInterface for CommandBuffer {}

#[derive(Debug)]
struct Queue(Arc<Shared>);

impl Queue {
    fn run(&self, command: &Command) {
        match command {
            Command::Copy { from, from_offset, to, to_offset, bytes } => {
                // SAFETY: `at` checks the ranges, and the queue's lock is held.
                unsafe { std::ptr::copy(from.at(*from_offset, *bytes), to.at(*to_offset, *bytes), *bytes as usize) }
            }
            Command::Clear { memory, offset, bytes } => {
                // SAFETY: as above.
                unsafe { std::ptr::write_bytes(memory.at(*offset, *bytes), 0, *bytes as usize) }
            }
            Command::Launch { pipeline, bindings, threadgroups } => {
                let Some(program) = &pipeline.program else { return };
                let bound = |number| {
                    let binding =
                        bindings.iter().find(|binding| binding.binding == number).expect("a layout's bindings are bound");
                    Bound { data: binding.memory.at(binding.offset, binding.bytes), bytes: binding.bytes as usize }
                };
                let Options { seed, .. } = self.0.options;
                // Seed 0 keeps the natural order; with any other, no two launches have the same.
                let launch = self.0.launches.fetch_add(1, Ordering::Relaxed);
                let seed = if seed == 0 { 0 } else { seed.wrapping_mul(0x9e37_79b9).wrapping_add(launch).max(1) };
                // SAFETY: the bindings keep the buffers alive, and the queue's lock is held.
                if let Err(error) = unsafe { program.launch(bound, *threadgroups, seed, &self.0.options) } {
                    self.0.fail(format!("{}: {error:#}", pipeline.name));
                }
            }
        }
    }
}

impl QueueInterface for Queue {
    fn write_buffer(&self, buffer: &DispatchBuffer, offset: wgpu::BufferAddress, data: &[u8]) {
        let _queue = lock(&self.0.queue);
        let to = custom::<Buffer>(buffer.as_custom()).0.at(offset, data.len() as u64);
        // SAFETY: `at` checks the range, and the queue's lock is held.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), to, data.len()) };
    }

    fn create_staging_buffer(&self, _: wgpu::BufferSize) -> Option<DispatchQueueWriteBuffer> {
        beyond_compute!(create_staging_buffer)
    }

    fn validate_write_buffer(&self, _: &DispatchBuffer, _: wgpu::BufferAddress, _: wgpu::BufferSize) -> Option<()> {
        beyond_compute!(validate_write_buffer)
    }

    fn write_staging_buffer(&self, _: &DispatchBuffer, _: wgpu::BufferAddress, _: &DispatchQueueWriteBuffer) {
        beyond_compute!(write_staging_buffer)
    }

    fn write_texture(&self, _: wgpu::TexelCopyTextureInfo<'_>, _: &[u8], _: wgpu::TexelCopyBufferLayout, _: wgpu::Extent3d) {
        beyond_compute!(write_texture)
    }

    fn submit(&self, buffers: &mut dyn Iterator<Item = DispatchCommandBuffer>) -> u64 {
        let _queue = lock(&self.0.queue);
        for buffer in buffers {
            custom::<CommandBuffer>(buffer.as_custom()).0.iter().for_each(|command| self.run(command));
        }
        self.0.submissions.fetch_add(1, Ordering::Relaxed)
    }

    fn get_timestamp_period(&self) -> f32 {
        1.0
    }

    fn on_submitted_work_done(&self, callback: BoxSubmittedWorkDoneCallback) {
        callback();
    }

    fn compact_blas(&self, _: &DispatchBlas) -> (Option<u64>, DispatchBlas) {
        beyond_compute!(compact_blas)
    }

    fn present(&self, _: &DispatchSurfaceOutputDetail) {
        beyond_compute!(present)
    }
}

//! Finding, ranking and opening wgpu adapters.

use super::Feature;
use crate::error::{Error, ErrorKind, Result};

/// An adapter and what it says of itself.
pub(crate) struct Adapter {
    pub adapter: wgpu::Adapter,
    pub info: wgpu::AdapterInfo,
}

/// A limit's name, how to read it, and the least that will do.
type Need = (&'static str, fn(&wgpu::Limits) -> u64, u64);

/// What every kernel of this crate lives within; an adapter that offers less is refused by name.
const NEEDED: [Need; 6] = [
    ("max_storage_buffers_per_shader_stage", |l| l.max_storage_buffers_per_shader_stage as u64, 8),
    ("max_compute_invocations_per_workgroup", |l| l.max_compute_invocations_per_workgroup as u64, 256),
    ("max_compute_workgroup_storage_size", |l| l.max_compute_workgroup_storage_size as u64, 16_352),
    ("max_compute_workgroups_per_dimension", |l| l.max_compute_workgroups_per_dimension as u64, 65_535),
    ("max_storage_buffer_binding_size", |l| l.max_storage_buffer_binding_size, 128 << 20),
    ("max_uniform_buffer_binding_size", |l| l.max_uniform_buffer_binding_size, 256),
];

/// Taken where the adapter offers it: what kernels may ask for, and the clock of their bench.
const WANTED: wgpu::Features = wgpu::Features::SUBGROUP.union(wgpu::Features::TIMESTAMP_QUERY);

/// Bytes of workgroup memory that some kernels take; all others live within those of [`NEEDED`].
const WORKGROUP_MEMORY: u32 = 24 << 10;

/// wgpu's name for what a kernel asks for.
pub(crate) fn feature(feature: Feature) -> wgpu::Features {
    match feature {
        Feature::Subgroups => wgpu::Features::SUBGROUP,
        Feature::CooperativeMatrices => COOPERATIVE,
    }
}

/// The matrices, and the type of their elements.
const COOPERATIVE: wgpu::Features = wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX.union(wgpu::Features::SHADER_F16);

/// Rows and columns of the cooperative matrices that kernels use: of f16, summed in f32. Each size is for subgroups of one size.
pub(crate) fn cooperative_edge(adapter: &wgpu::Adapter) -> Option<u32> {
    use wgpu::CooperativeScalarType::{F16, F32};
    let info = adapter.get_info();
    if !adapter.features().contains(COOPERATIVE.union(wgpu::Features::SUBGROUP)) {
        return None;
    }
    let offered = adapter.cooperative_matrix_properties();
    let has =
        |edge: u32| offered.iter().any(|p| [p.m_size, p.n_size, p.k_size] == [edge; 3] && (p.ab_type, p.cr_type) == (F16, F32));
    let lanes = [info.subgroup_min_size, info.subgroup_max_size];
    [(16, 32), (8, 8)].into_iter().find(|(edge, size)| lanes == [*size; 2] && has(*edge)).map(|(edge, _)| edge)
}

/// Adapters that are fast at the same things.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    /// A driver that computes on the CPU.
    Software,
    Nvidia,
    Amd,
    Intel,
    Apple,
    Other,
}

impl Class {
    pub fn of(info: &wgpu::AdapterInfo) -> Self {
        match (info.device_type, info.vendor) {
            (wgpu::DeviceType::Cpu, _) => Self::Software,
            (_, 0x10de) => Self::Nvidia,
            (_, 0x1002) => Self::Amd,
            (_, 0x8086) => Self::Intel,
            _ if info.backend == wgpu::Backend::Metal || info.vendor == 0x106b => Self::Apple,
            _ => Self::Other,
        }
    }
}

fn instance() -> wgpu::Instance {
    // Indirect-call validation caps buffers at 4 GiB, and nothing here dispatches indirectly.
    let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
    descriptor.flags = wgpu::InstanceFlags::empty().with_env();
    descriptor.backends = wgpu::Backends::all().with_env();
    wgpu::Instance::new(descriptor)
}

/// What an adapter must be able to do: compute, and read pairs of f16 in a word.
const FLAGS: wgpu::DownlevelFlags = wgpu::DownlevelFlags::COMPUTE_SHADERS.union(wgpu::DownlevelFlags::SHADER_F16_IN_F32);

/// Every adapter of the machine that can run the kernels, best first.
pub(crate) async fn all() -> Vec<Adapter> {
    let found = instance().enumerate_adapters(wgpu::Backends::all()).await;
    let mut adapters: Vec<Adapter> = found
        .into_iter()
        .filter(|adapter| adapter.get_downlevel_capabilities().flags.contains(FLAGS))
        .map(|adapter| Adapter { info: info(&adapter), adapter })
        .collect();
    adapters.sort_by_key(|a| rank(&a.info));
    adapters
}

/// What an adapter says of itself. Browsers may keep its name from programs.
pub(crate) fn info(adapter: &wgpu::Adapter) -> wgpu::AdapterInfo {
    let mut info = adapter.get_info();
    if info.name.is_empty() {
        info.name = "unnamed".into();
    }
    info
}

/// Smaller is better: hardware before software, discrete before integrated, native interfaces before GL.
fn rank(info: &wgpu::AdapterInfo) -> (u8, u8) {
    let kind = match info.device_type {
        wgpu::DeviceType::DiscreteGpu => 0,
        wgpu::DeviceType::IntegratedGpu => 1,
        wgpu::DeviceType::VirtualGpu => 2,
        wgpu::DeviceType::Other => 3,
        wgpu::DeviceType::Cpu => 4,
    };
    (kind, u8::from(info.backend == wgpu::Backend::Gl))
}

/// Whether the adapter is a GPU that may be chosen without being named.
pub(crate) fn is_hardware(info: &wgpu::AdapterInfo) -> bool {
    match info.device_type {
        wgpu::DeviceType::DiscreteGpu | wgpu::DeviceType::IntegratedGpu | wgpu::DeviceType::VirtualGpu => true,
        // Browsers tell nothing of the hardware; they hand out a software adapter only when told to.
        wgpu::DeviceType::Other => info.backend == wgpu::Backend::BrowserWebGpu,
        wgpu::DeviceType::Cpu => false,
    }
}

/// `vulkan`, `metal`, `dx12`, `gl`, `webgpu`.
pub(crate) fn backend_name(backend: wgpu::Backend) -> &'static str {
    match backend {
        wgpu::Backend::Vulkan => "vulkan",
        wgpu::Backend::Metal => "metal",
        wgpu::Backend::Dx12 => "dx12",
        wgpu::Backend::Gl => "gl",
        wgpu::Backend::BrowserWebGpu => "webgpu",
        wgpu::Backend::Noop => "noop",
    }
}

/// Whether `wanted`, a part of a name or `backend:part`, names this adapter; letter case does not count.
pub(crate) fn matches(wanted: &str, info: &wgpu::AdapterInfo) -> bool {
    let (wanted, name) = (wanted.to_lowercase(), info.name.to_lowercase());
    match wanted.split_once(':') {
        Some((backend, part)) if backend == backend_name(info.backend) => name.contains(part),
        _ => !wanted.is_empty() && name.contains(&wanted),
    }
}

/// Opens the adapter with the limits that the kernels need, the largest buffers, and what else of use it offers.
pub(crate) async fn open(adapter: &Adapter) -> Result<(wgpu::Device, wgpu::Queue)> {
    let offered = adapter.adapter.limits();
    check_limits(&adapter.info.name, &offered)?;
    let required_limits = wgpu::Limits {
        max_storage_buffers_per_shader_stage: 8,
        max_compute_workgroup_storage_size: offered.max_compute_workgroup_storage_size.min(WORKGROUP_MEMORY),
        max_storage_buffer_binding_size: offered.max_storage_buffer_binding_size,
        max_buffer_size: offered.max_buffer_size,
        ..wgpu::Limits::downlevel_defaults().using_resolution(offered.clone())
    };
    let mut required_features = WANTED & adapter.adapter.features();
    let mut experimental_features = wgpu::ExperimentalFeatures::disabled();
    if cooperative_edge(&adapter.adapter).is_some() {
        required_features |= COOPERATIVE;
        // SAFETY: wgpu checks less of shaders that use cooperative matrices; all that do are this crate's own.
        experimental_features = unsafe { wgpu::ExperimentalFeatures::enabled() };
    }
    let label = Some("gatefold");
    let descriptor =
        wgpu::DeviceDescriptor { label, required_limits, required_features, experimental_features, ..Default::default() };
    adapter.adapter.request_device(&descriptor).await.map_err(|error| {
        refuse(&adapter.info.name, ErrorKind::NoDevice, format!("cannot be opened ({error})")).with_source(error)
    })
}

/// `device: name: limit .. is .., expected at least ..` for limits that the kernels cannot live within.
pub(crate) fn check_limits(name: &str, offered: &wgpu::Limits) -> Result<()> {
    match NEEDED.iter().find(|(_, read, needed)| read(offered) < *needed) {
        Some((limit, read, needed)) => {
            Err(refuse(name, ErrorKind::Limit, format!("limit {limit} is {}, expected at least {needed}", read(offered))))
        }
        None => Ok(()),
    }
}

fn refuse(name: &str, kind: ErrorKind, what: String) -> Error {
    Error::new(kind, format!("device: {name}: {what}; GATEFOLD_DEVICE=cpu or Device::cpu() runs on the CPU instead"))
}

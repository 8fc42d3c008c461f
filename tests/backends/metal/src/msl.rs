//! A compute pipeline's MSL, as wgpu's Metal backend has naga write it, compiled as C++ and run by the scheduler of
//! `include/metal_stdlib`.

use std::cell::RefCell;
use std::collections::hash_map::DefaultHasher;
use std::ffi::{CStr, c_char};
use std::fmt::Write;
use std::hash::{Hash, Hasher};
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use naga::back::{msl, pipeline_constants};
use naga::proc::{BoundsCheckPolicies, BoundsCheckPolicy};
use naga::valid::ModuleInfo;
use naga::{AddressSpace, Module, ResourceBinding, ShaderStage, TypeInner};

const INCLUDE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/include");
const HEADER: &str = include_str!("../include/metal_stdlib");

/// Metal's floating-point literals are float. Buffers hold one type for one kernel and another for the next.
const FLAGS: &str = "-std=c++17 -O2 -march=native -shared -fPIC -w -fsingle-precision-constant -fno-strict-aliasing -fno-exceptions \
                     -fno-math-errno";
const EXACT: &str = "-ffp-contract=off";
/// What -ffast-math means, but for the flush of denormals, which it would turn on for the whole process.
const FAST: &str =
    "-ffp-contract=fast -fassociative-math -freciprocal-math -fno-signed-zeros -fno-trapping-math -ffinite-math-only";

/// Metal's [[buffer(n)]] are numbered below this.
const BUFFERS: u32 = 31;
/// Bytes of an error's text, and the byte after it that says whether there is one.
const ERROR: usize = 256;

/// The C++ compiler.
#[derive(Clone, Debug)]
pub struct Compiler {
    program: String,
    /// Its version and the CPU that it compiles for, by its own account: what it compiled elsewhere is not for here.
    identity: Vec<u8>,
}

impl Compiler {
    /// What CXX names, or g++.
    pub fn find() -> Result<Self> {
        let program = std::env::var("CXX").unwrap_or_else(|_| "g++".into());
        let asked = Command::new(&program).args(["-march=native", "-E", "-v", "-x", "c++", "/dev/null"]).output();
        let asked = asked.with_context(|| format!("{program} cannot be run; CXX names another C++ compiler"))?;
        ensure!(asked.status.success(), "{program}: {}", String::from_utf8_lossy(&asked.stderr));
        Ok(Self { program, identity: asked.stderr })
    }
}

/// How shaders are compiled and run.
#[derive(Clone, Debug)]
pub struct Options {
    /// By what.
    pub compiler: Compiler,
    /// Where the shared objects are kept.
    pub folder: PathBuf,
    /// Lanes of a simdgroup.
    pub simd: u32,
    /// Threadgroups that run at once, where they may wait for each other.
    pub resident: u32,
    /// Of the order of threads; 0 is that of their indices.
    pub seed: u32,
    /// Whether floats may be reassociated and contracted, as by Metal's default.
    pub fast_math: bool,
}

/// A pipeline's stage: what wgpu-core gives to wgpu-hal.
pub struct Stage<'a> {
    pub module: &'a Module,
    pub info: &'a ModuleInfo,
    pub entry: &'a str,
    pub constants: &'a [(&'a str, f64)],
    pub zero_workgroup_memory: bool,
    pub checks: wgpu::ShaderRuntimeChecks,
    /// Each binding of group 0 in the layout's order, and whether it may be written.
    pub bindings: &'a [(u32, bool)],
}

/// A buffer as it is bound, as in the header.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Bound {
    pub data: *mut u8,
    pub bytes: usize,
}

/// As in the header.
#[repr(C)]
struct Launch {
    bindings: *const Bound,
    threadgroups: [u32; 3],
    seed: u32,
    resident: u32,
    simd: u32,
    next: u32,
    error: *mut c_char,
}

/// A kernel in machine code.
pub struct Program {
    run: unsafe extern "C" fn(*mut Launch, *mut u8),
    memory: unsafe extern "C" fn(*const Launch) -> usize,
    /// The bindings in the order of their buffer slots.
    bindings: Vec<u32>,
    /// Those whose sizes follow in a buffer of their own.
    sized: Vec<u32>,
    /// Whether threadgroups may wait for each other.
    waits: bool,
    _library: libloading::Library,
}

/// What naga writes, and what the host must know of it.
struct Translated {
    source: String,
    entry: String,
    workgroup: [u32; 3],
    /// Bytes of each variable of workgroup memory, in the order of the arguments.
    memory: Vec<u32>,
    sized: Vec<u32>,
    waits: bool,
}

impl Program {
    /// Translates and compiles a stage, or finds it compiled.
    pub fn new(stage: &Stage<'_>, options: &Options) -> Result<Self> {
        let translated = translate(stage)?;
        let text = program(&translated)?;
        let path = compile(stage.entry, &text, options)?;
        // SAFETY: the library is what `compile` made of the header and of naga's output: it runs nothing when it is loaded.
        let library = unsafe { libloading::Library::new(&path) }.with_context(|| path.display().to_string())?;
        // SAFETY: `program` defines both with these types.
        let (run, memory) = unsafe { (*library.get(b"metal_run\0")?, *library.get(b"metal_memory\0")?) };
        let bindings = stage.bindings.iter().map(|(binding, _)| *binding).collect();
        Ok(Self { run, memory, bindings, sized: translated.sized, waits: translated.waits, _library: library })
    }

    /// Runs all threadgroups. `bound`: the buffer of each binding.
    ///
    /// # Safety
    /// The buffers must be alive, nothing else may use them meanwhile but what was bound for reading only.
    pub unsafe fn launch(
        &self,
        bound: impl Fn(u32) -> Bound,
        threadgroups: [u32; 3],
        seed: u32,
        options: &Options,
    ) -> Result<()> {
        if threadgroups.contains(&0) {
            return Ok(());
        }
        let mut sizes: Vec<u32> = self.sized.iter().map(|binding| bound(*binding).bytes.try_into().unwrap_or(u32::MAX)).collect();
        let mut bindings: Vec<Bound> = self.bindings.iter().map(|binding| bound(*binding)).collect();
        bindings.push(Bound { data: sizes.as_mut_ptr().cast(), bytes: size_of_val(&sizes[..]) });
        let mut error = [0u8; ERROR];
        let mut launch = Launch {
            bindings: bindings.as_ptr(),
            threadgroups,
            seed,
            resident: if self.waits { options.resident } else { 1 },
            simd: options.simd,
            next: 0,
            error: error.as_mut_ptr().cast(),
        };
        let shared = Shared(&raw mut launch);
        if self.waits || threadgroups == [1; 3] {
            self.work(shared);
        } else {
            rayon::join(|| self.work(shared), || self.work(shared));
        }
        if error[ERROR - 1] != 0 {
            bail!("{}", CStr::from_bytes_until_nul(&error).unwrap_or_default().to_string_lossy());
        }
        Ok(())
    }

    /// Runs threadgroups until none is left; several threads may at once.
    fn work(&self, launch: Shared) {
        thread_local! {
            static MEMORY: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
        }
        MEMORY.with_borrow_mut(|memory| {
            // SAFETY: as large as the program says that it must be. All that threads share in the launch they change by atomics.
            unsafe {
                let bytes = (self.memory)(launch.0);
                if memory.len() < bytes {
                    *memory = vec![0; bytes];
                }
                (self.run)(launch.0, memory.as_mut_ptr());
            }
        });
    }
}

/// A launch that several threads work on.
#[derive(Clone, Copy)]
struct Shared(*mut Launch);

// SAFETY: threads change what they share of it by atomics, and it outlives them.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

/// The MSL of a stage, with the options of wgpu-hal's `Device::load_shader` and `create_pipeline_layout` of its Metal backend.
fn translate(stage: &Stage<'_>) -> Result<Translated> {
    let constants = stage.constants.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect();
    let point = Some((ShaderStage::Compute, stage.entry));
    let (module, info) = pipeline_constants::process_overrides(stage.module, stage.info, point, &constants)?;

    let target = |(slot, (binding, mutable)): (usize, &(u32, bool))| {
        let target = msl::BindTarget { buffer: Some(slot as msl::Slot), mutable: *mutable, ..Default::default() };
        (ResourceBinding { group: 0, binding: *binding }, target)
    };
    let resources = msl::EntryPointResources {
        resources: stage.bindings.iter().enumerate().map(target).collect(),
        immediates_buffer: None,
        sizes_buffer: Some(stage.bindings.len() as msl::Slot),
    };
    ensure!(
        stage.bindings.len() < BUFFERS as usize,
        "{} bindings, Metal has {BUFFERS} with that of their sizes",
        stage.bindings.len()
    );
    let checks = stage.checks;
    let policy = if checks.bounds_checks { BoundsCheckPolicy::Restrict } else { BoundsCheckPolicy::Unchecked };
    let options = msl::Options {
        lang_version: (3, 1),
        inline_samplers: Vec::new(),
        spirv_cross_compatibility: false,
        fake_missing_bindings: false,
        per_entry_point_map: [(stage.entry.to_owned(), resources)].into_iter().collect(),
        bounds_check_policies: BoundsCheckPolicies {
            index: policy,
            buffer: policy,
            image_load: policy,
            binding_array: BoundsCheckPolicy::Unchecked,
        },
        zero_initialize_workgroup_memory: stage.zero_workgroup_memory,
        force_loop_bounding: checks.force_loop_bounding,
        task_dispatch_limits: None,
        mesh_shader_primitive_indices_clamp: checks.mesh_shader_primitive_indices_clamp,
        emit_int_div_checks: checks.int_div_checks,
        ray_query_initialization_tracking: checks.ray_query_initialization_tracking,
    };
    let pipeline = msl::PipelineOptions {
        entry_point: Some((ShaderStage::Compute, stage.entry.to_owned())),
        allow_and_force_point_size: false,
        vertex_pulling_transform: true,
        vertex_buffer_mappings: Vec::new(),
        binding_array_length_map: Default::default(),
    };
    let (source, written) = msl::write_string(&module, &info, &options, &pipeline)?;
    let entry = match &written.entry_point_names[..] {
        [name] => name.clone()?,
        names => bail!("{} entry points", names.len()),
    };

    let index = module.entry_points.iter().position(|point| point.name == stage.entry).context("no such entry point")?;
    let used = info.get_entry_point(index);
    let (mut memory, mut sized, mut waits) = (Vec::new(), Vec::new(), false);
    for (handle, variable) in module.global_variables.iter() {
        let ty = &module.types[variable.ty].inner;
        // What threadgroups exchange lies in arrays of atomics.
        waits |= match (variable.space, ty) {
            (AddressSpace::Storage { .. }, TypeInner::Array { base, .. }) if !used[handle].is_empty() => {
                matches!(module.types[*base].inner, TypeInner::Atomic(_))
            }
            _ => false,
        };
        match (variable.space, variable.binding) {
            (AddressSpace::WorkGroup, _) if !used[handle].is_empty() => {
                memory.push(ty.size(module.to_ctx()).next_multiple_of(16));
            }
            (AddressSpace::Uniform | AddressSpace::Storage { .. }, Some(at)) if ty.needs_host_buffer_byte_size(&module.types) => {
                sized.push(at.binding);
            }
            _ => {}
        }
    }
    Ok(Translated { source, entry, workgroup: module.entry_points[index].workgroup_size, memory, sized, waits })
}

/// naga's output as a C++ program: the scheduler's sizes before it, after it the call of the entry point for one thread.
fn program(translated: &Translated) -> Result<String> {
    let Translated { source, entry, workgroup: [x, y, z], memory, .. } = translated;
    let Arguments { setup, list } = arguments(translated)?;
    let threads = x * y * z;
    let bytes: u32 = memory.iter().sum();
    let meets = ["threadgroup_barrier", "metal::simd", "atomic_load_explicit"].iter().any(|word| source.contains(word));
    let checked = with_checked_arrays(source);
    Ok(format!(
        r#"#define METAL_THREADS {threads}u
#define METAL_MEMORY {bytes}
#define METAL_MEETS {meets}
#line 1 "{entry}.metal"
{checked}
static void metal::run_thread(const Launch &launch, char *memory, Index3 group, uint index) {{
  uint3 local(index % {x}, index / {x} % {y}, index / ({x} * {y}));
{setup}  {entry}({list});
}}
extern "C" void metal_run(metal::Launch *launch, char *memory) {{ metal::run(*launch, memory); }}
extern "C" metal::size_t metal_memory(const metal::Launch *launch) {{ return metal::groups_of(*launch) * metal::EACH + 64; }}
"#
    ))
}

/// Arrays of bindings, which have one element by name, and those of other types, which are members of structs of their own, as
/// classes of the header that check indices.
fn with_checked_arrays(source: &str) -> String {
    let line = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["#include", "<simd/simd.h>"] => String::new(),
            ["typedef", element, name] if name.ends_with("[1];") => {
                format!("typedef metal::runtime_array<{element}> {};", name.trim_end_matches("[1];"))
            }
            [element, inner] if inner.starts_with("inner[") && inner.ends_with("];") => {
                let count = inner.trim_start_matches("inner[").trim_end_matches("];");
                format!("    metal::array<{element}, {count}> inner;")
            }
            _ => line.to_owned(),
        }
    };
    source.lines().map(line).collect::<Vec<_>>().join("\n")
}

/// The arguments of an entry point, and what makes them from a launch.
struct Arguments {
    setup: String,
    list: String,
}

fn arguments(translated: &Translated) -> Result<Arguments> {
    let Translated { source, entry, workgroup: [x, y, z], memory, .. } = translated;
    let (_, after) = source.split_once(&format!("kernel void {entry}(\n")).context("naga wrote no such entry point")?;
    let (parameters, _) = after.split_once("\n) {").context("an entry point without an end")?;
    let (mut setup, mut list, mut place, mut variables) = (String::new(), Vec::new(), 0, memory.iter());
    for (number, parameter) in parameters.lines().map(|line| line.trim().trim_start_matches(", ")).enumerate() {
        let words: Vec<&str> = parameter.split_whitespace().collect();
        let ty = words.get(1).map_or("", |word| word.trim_end_matches('&'));
        let attribute = parameter.split_once("[[").and_then(|(_, rest)| rest.split_once("]]")).map(|(attribute, _)| attribute);
        list.push(match (words[0], attribute) {
            // Metal numbers these arguments by their order, and so does wgpu-hal their sizes.
            ("threadgroup", None) => {
                let at = place;
                place += variables.next().with_context(|| format!("{parameter}: no memory"))?;
                format!("*({ty}*)(memory + {at})")
            }
            ("device" | "constant", Some(slot)) => {
                let slot = slot.strip_prefix("buffer(").and_then(|slot| slot.strip_suffix(')')).context("no buffer")?;
                writeln!(setup, "  auto &&argument_{number} = metal::Bound<{ty}>::at(launch.bindings[{slot}]);")?;
                format!("argument_{number}")
            }
            (_, Some("thread_position_in_threadgroup")) => "local".into(),
            (_, Some("thread_position_in_grid")) => format!("metal::uint3(group) * metal::uint3({x}, {y}, {z}) + local"),
            (_, Some("thread_index_in_threadgroup")) => "index".into(),
            (_, Some("threadgroup_position_in_grid")) => "group".into(),
            (_, Some("threadgroups_per_grid")) => "launch.threadgroups".into(),
            (_, Some("threads_per_simdgroup")) => "launch.simd".into(),
            (_, Some("thread_index_in_simdgroup")) => "index % launch.simd".into(),
            (_, Some("simdgroup_index_in_threadgroup")) => "index / launch.simd".into(),
            _ => bail!("an argument that the harness does not know: {parameter}"),
        });
    }
    ensure!(variables.next().is_none(), "workgroup memory without an argument");
    Ok(Arguments { setup, list: list.join(", ") })
}

/// The shared object of a program: compiled, unless it is in the folder.
fn compile(name: &str, text: &str, options: &Options) -> Result<PathBuf> {
    let floats = if options.fast_math { FAST } else { EXACT };
    let flags: Vec<&str> = FLAGS.split(' ').chain(floats.split(' ')).collect();
    let Compiler { program: compiler, identity } = &options.compiler;
    let mut hasher = DefaultHasher::new();
    (text, HEADER, &flags, compiler, identity).hash(&mut hasher);
    let stem = options.folder.join(format!("{name}-{:016x}", hasher.finish()));
    let (source, object) = (stem.with_extension("cpp"), stem.with_extension("so"));
    if !object.exists() {
        std::fs::create_dir_all(&options.folder)?;
        std::fs::write(&source, text)?;
        // Whole or absent, also where two build it at once.
        let part = stem.with_extension(format!("{}.part", std::process::id()));
        let output = Command::new(compiler).args(&flags).args(["-I", INCLUDE, "-o"]).args([&part, &source]).output();
        let output = output.with_context(|| format!("{compiler} cannot be run"))?;
        ensure!(output.status.success(), "{compiler} refuses {}:\n{}", source.display(), String::from_utf8_lossy(&output.stderr));
        std::fs::rename(&part, &object)?;
    }
    // dlopen looks for a name without a slash in the system's folders.
    Ok(std::path::absolute(object)?)
}

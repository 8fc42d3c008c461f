//! Every shader, without a GPU: parsed, validated and translated to every language that wgpu speaks; and what Rust takes it to
//! be (uniform struct, bindings, workgroup) compared with what it is.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, anyhow, bail, ensure};
use gatefold::verify::shaders::{self, Access, Feature, Kernel, Layout};
use naga::back::{glsl, hlsl, msl, spv};
use naga::valid::{Capabilities, ModuleInfo, ShaderStages, SubgroupOperationSet, ValidationFlags, Validator};
use naga::{AddressSpace, Expression, Handle, Module, ScalarKind, ShaderStage, StorageAccess, StructMember, Type, TypeInner};

/// What WebGPU grants without asking: storage buffers a stage, and bytes of workgroup memory.
const STORAGE_BUFFERS: usize = 8;
const WORKGROUP_BYTES: u32 = 16 << 10;
/// What every adapter with cooperative matrices has.
const COOPERATIVE_BYTES: u32 = 24 << 10;

/// The entry point alone, as wgpu hands it to a backend.
struct Shader {
    module: Module,
    info: ModuleInfo,
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("shaders")
}

/// File names and their text.
fn files() -> Result<Vec<(String, String)>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder())? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        ensure!(name.ends_with(".wgsl"), "shaders/{name} is no .wgsl file");
        files.push((name, std::fs::read_to_string(&path)?));
    }
    files.sort();
    ensure!(!files.is_empty(), "shaders/ is empty");
    Ok(files)
}

/// `gemm (gemm.wgsl)`: a kernel and the files that it is made of.
fn title(kernel: &Kernel) -> Result<String> {
    let mut parts: Vec<(usize, String)> =
        files()?.into_iter().filter_map(|(name, text)| Some((kernel.source.find(&text)?, name))).collect();
    parts.sort();
    let names: Vec<String> = parts.into_iter().map(|(_, name)| name).collect();
    Ok(format!("{} ({})", kernel.name, names.join(" + ")))
}

fn capabilities(feature: Feature) -> Capabilities {
    match feature {
        Feature::Subgroups => Capabilities::SUBGROUP,
        Feature::CooperativeMatrices => Capabilities::COOPERATIVE_MATRIX | Capabilities::SHADER_FLOAT16,
    }
}

/// Whether the language has words for all that the kernel asks for.
fn can_say(kernel: &Kernel, subgroups: bool) -> bool {
    kernel.features.iter().all(|feature| match feature {
        Feature::Subgroups => subgroups,
        // Metal has them, but of 8 x 8 for subgroups of 32 lanes, which no kernel is for.
        Feature::CooperativeMatrices => false,
    })
}

fn parse(kernel: &Kernel) -> Result<Shader> {
    let source = shaders::without_aliases(kernel.source);
    let whole =
        naga::front::wgsl::parse_str(&source).map_err(|error| anyhow!("does not parse:\n{}", error.emit_to_string(&source)))?;
    // No capability beyond those that every adapter has, and those that the kernel asks for.
    let asked: Capabilities = kernel.features.iter().map(|feature| capabilities(*feature)).collect();
    // Pairs of f16 in a word can be read on every adapter that `backend::adapter` lists.
    let capabilities = Capabilities::SHADER_FLOAT16_IN_FLOAT32 | asked;
    let validate = |module: &Module| {
        let mut validator = Validator::new(ValidationFlags::all(), capabilities);
        validator.subgroup_stages(ShaderStages::COMPUTE).subgroup_operations(SubgroupOperationSet::all());
        let validated = validator.validate(module);
        validated.map_err(|error| anyhow!("is not valid:\n{}", error.emit_to_string(&source)))
    };
    let info = validate(&whole)?;
    let entry = (ShaderStage::Compute, kernel.entry);
    let (module, _) = naga::back::pipeline_constants::process_overrides(&whole, &info, Some(entry), &Default::default())?;
    let mut module = module.into_owned();
    module.entry_points.retain(|point| point.name == kernel.entry);
    ensure!(module.entry_points.len() == 1, "has no entry point {}", kernel.entry);
    naga::compact::compact(&mut module, naga::compact::KeepUnused::No);
    let info = validate(&module)?;
    Ok(Shader { module, info })
}

/// Runs `check` on every kernel and reports all that fail.
fn for_each(check: impl Fn(&Kernel, &Shader) -> Result<()>) -> Result<()> {
    let kernels = shaders::all();
    ensure!(!kernels.is_empty(), "there are no kernels");
    let mut failures = Vec::new();
    for kernel in kernels {
        let title = title(kernel)?;
        if let Err(error) = parse(kernel).and_then(|shader| check(kernel, &shader)) {
            failures.push(format!("{title}: {error:#}"));
        }
    }
    ensure!(failures.is_empty(), "{}", failures.join("\n\n"));
    Ok(())
}

/// Whether the checkers of other makers are asked too: `spirv-val` and `glslangValidator` (packages spirv-tools, glslang-tools).
fn ask_others() -> bool {
    std::env::var_os("GATEFOLD_VALIDATORS").is_some()
}

/// Hands a translated shader to another maker's checker.
fn ask(checker: &str, arguments: &[&str], translated: &[u8]) -> Result<()> {
    let pipes = || Stdio::piped();
    let mut command = Command::new(checker);
    let mut child =
        command.args(arguments).stdin(pipes()).stdout(pipes()).stderr(pipes()).spawn().with_context(|| checker.to_owned())?;
    child.stdin.take().context("no pipe")?.write_all(translated)?;
    let output = child.wait_with_output()?;
    let said = || [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text)).concat();
    ensure!(output.status.success(), "{checker} {}: {}", arguments.join(" "), said());
    Ok(())
}

#[test]
fn parse_and_validate() -> Result<()> {
    for_each(|_, _| Ok(()))
}

#[test]
fn translate_to_spir_v() -> Result<()> {
    for_each(|kernel, Shader { module, info }| {
        let options = spv::Options { lang_version: (1, 3), ..Default::default() };
        let pipeline = spv::PipelineOptions { shader_stage: ShaderStage::Compute, entry_point: kernel.entry.into() };
        let words = spv::write_vec(module, info, &options, Some(&pipeline))?;
        ensure!(!words.is_empty(), "nothing was written");
        // Debian 12's spirv-val is older than cooperative matrices.
        if ask_others() && !kernel.features.contains(&Feature::CooperativeMatrices) {
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            ask("spirv-val", &["--target-env", "vulkan1.1", "-"], &bytes)?;
        }
        Ok(())
    })
}

#[test]
fn translate_to_msl() -> Result<()> {
    for_each(|kernel, Shader { module, info }| {
        let entry_point = Some((ShaderStage::Compute, kernel.entry.to_owned()));
        for lang_version in [(2, 0), (2, 4), (3, 1)].into_iter().filter(|_| can_say(kernel, true)) {
            let options = msl::Options { lang_version, ..Default::default() };
            let pipeline = msl::PipelineOptions { entry_point: entry_point.clone(), ..Default::default() };
            let (_, translated) = msl::write_string(module, info, &options, &pipeline)?;
            ensure!(translated.entry_point_names.len() == 1, "not one entry point but {:?}", translated.entry_point_names);
            translated.entry_point_names.into_iter().collect::<Result<Vec<_>, _>>()?;
        }
        Ok(())
    })
}

#[test]
fn translate_to_hlsl() -> Result<()> {
    for_each(|kernel, Shader { module, info }| {
        use hlsl::ShaderModel::{V5_1, V6_0};
        for shader_model in [V5_1, V6_0].into_iter().filter(|model| can_say(kernel, *model >= V6_0)) {
            let options = hlsl::Options { shader_model, ..Default::default() };
            let pipeline = hlsl::PipelineOptions { entry_point: Some((ShaderStage::Compute, kernel.entry.to_owned())) };
            let mut text = String::new();
            let translated = hlsl::Writer::new(&mut text, &options, &pipeline).write(module, info, None)?;
            // Of the functions that naga adds, and the types of what they return, none may be there twice: see `without_aliases`.
            let mut added: Vec<&str> = text.lines().filter(|line| line.starts_with("typedef ")).collect();
            added.sort_unstable();
            ensure!(added.windows(2).all(|pair| pair[0] != pair[1]), "something is there twice: {added:?}");
            ensure!(translated.entry_point_names.len() == 1, "not one entry point but {:?}", translated.entry_point_names);
            translated.entry_point_names.into_iter().collect::<Result<Vec<_>, _>>()?;
        }
        Ok(())
    })
}

/// FXC makes a dot product of `v[i]`, in which one NaN or infinity spreads to its neighbours: component.wgsl does not.
#[test]
fn no_float_of_a_vector_is_taken_by_a_place_of_run_time() -> Result<()> {
    for_each(|kernel, Shader { module, info }| {
        let inner = |ty: &TypeInner| match *ty {
            TypeInner::Vector { scalar, .. } | TypeInner::ValuePointer { size: Some(_), scalar, .. } => Some(scalar.kind),
            TypeInner::Pointer { base, .. } => match module.types[base].inner {
                TypeInner::Vector { scalar, .. } => Some(scalar.kind),
                _ => None,
            },
            _ => None,
        };
        let entry = (&module.entry_points[0].function, info.get_entry_point(0));
        for (function, info) in module.functions.iter().map(|(handle, f)| (f, &info[handle])).chain([entry]) {
            let is_taken = |expression: &Expression| match *expression {
                Expression::Access { base, .. } => inner(info[base].ty.inner_with(&module.types)) == Some(ScalarKind::Float),
                _ => false,
            };
            // The languages that FXC is not for have subgroups.
            let taken = can_say(kernel, false) && function.expressions.iter().any(|(_, expression)| is_taken(expression));
            ensure!(!taken, "{}", function.name.as_deref().unwrap_or(kernel.entry));
        }
        Ok(())
    })
}

#[test]
fn translate_to_glsl() -> Result<()> {
    for_each(|kernel, Shader { module, info }| {
        let versions = [(glsl::Version::Embedded { version: 310, is_webgl: false }, false), (glsl::Version::Desktop(450), true)];
        for (version, _) in versions.into_iter().filter(|(_, subgroups)| can_say(kernel, *subgroups)) {
            let options = glsl::Options { version, ..Default::default() };
            let pipeline =
                glsl::PipelineOptions { shader_stage: ShaderStage::Compute, entry_point: kernel.entry.into(), multiview: None };
            let mut text = String::new();
            let policies = Default::default();
            glsl::Writer::new(&mut text, module, info, &options, &pipeline, policies)?.write()?;
            if ask_others() {
                ask("glslangValidator", &["--stdin", "-S", "comp"], text.as_bytes())?;
            }
        }
        Ok(())
    })
}

/// `params: Layout` against the shader's struct: name, size, every member's name and offset; members are 32-bit scalars.
fn compare_struct(module: &Module, ty: Handle<Type>, layout: &Layout) -> Result<()> {
    let ty = &module.types[ty];
    let TypeInner::Struct { members, span } = &ty.inner else { bail!("{:?} is no struct", ty.name) };
    let name = ty.name.as_deref().unwrap_or_default();
    ensure!(name == layout.name, "struct {name} is {} in Rust", layout.name);
    ensure!(*span as usize == layout.size, "struct {name} has {span} bytes, {} in Rust", layout.size);
    let wgsl: Vec<(&str, usize)> =
        members.iter().map(|member| (member.name.as_deref().unwrap_or_default(), member.offset as usize)).collect();
    ensure!(wgsl == layout.fields, "struct {name} has the members {wgsl:?}, {:?} in Rust", layout.fields);
    let is_scalar = |member: &StructMember| match module.types[member.ty].inner {
        TypeInner::Scalar(scalar) | TypeInner::Atomic(scalar) => scalar.width == 4,
        _ => false,
    };
    ensure!(members.iter().all(is_scalar), "struct {name} has a member that is no 32-bit scalar");
    Ok(())
}

/// Handle, binding and use of each buffer in an address space that the entry point touches.
fn globals<'a>(shader: &'a Shader, wanted: impl Fn(AddressSpace) -> bool + 'a) -> impl Iterator<Item = &'a naga::GlobalVariable> {
    let used = shader.info.get_entry_point(0);
    let variables = shader.module.global_variables.iter();
    variables.filter(move |(handle, variable)| !used[*handle].is_empty() && wanted(variable.space)).map(|(_, variable)| variable)
}

#[test]
fn uniform_structs_are_as_in_rust() -> Result<()> {
    for_each(|kernel, shader| {
        let uniforms: Vec<_> = globals(shader, |space| space == AddressSpace::Uniform).collect();
        let [uniform] = uniforms[..] else { bail!("uses {} uniform buffers", uniforms.len()) };
        let at = uniform.binding.context("the uniform has no binding")?;
        ensure!((at.group, at.binding) == (0, 0), "the uniform is at group {} binding {}", at.group, at.binding);
        compare_struct(&shader.module, uniform.ty, &kernel.params)
    })
}

#[test]
fn storage_bindings_are_as_in_rust() -> Result<()> {
    for_each(|kernel, shader| {
        let mut bindings = Vec::new();
        for variable in globals(shader, |space| matches!(space, AddressSpace::Storage { .. })) {
            let at = variable.binding.with_context(|| format!("{:?} has no binding", variable.name))?;
            ensure!(at.group == 0, "{:?} is in group {}", variable.name, at.group);
            let AddressSpace::Storage { access } = variable.space else { continue };
            let writes = access.contains(StorageAccess::STORE);
            bindings.push((at.binding, if writes { Access::ReadWrite } else { Access::Read }));
        }
        bindings.sort_by_key(|(binding, _)| *binding);
        ensure!(bindings == kernel.bindings, "uses the bindings {bindings:?}, {:?} in Rust", kernel.bindings);
        ensure!(bindings.len() <= STORAGE_BUFFERS, "uses {} storage buffers", bindings.len());
        Ok(())
    })
}

#[test]
fn workgroups_are_as_in_rust() -> Result<()> {
    for_each(|kernel, shader| {
        let size = shader.module.entry_points[0].workgroup_size;
        ensure!(size == [kernel.workgroup, 1, 1], "has workgroups of {size:?}, {} in Rust", kernel.workgroup);
        ensure!(kernel.workgroup <= 256, "has workgroups of {size:?}, more than 256");
        let context = shader.module.to_ctx();
        let memory = globals(shader, |space| space == AddressSpace::WorkGroup);
        let bytes: u32 = memory.map(|variable| shader.module.types[variable.ty].inner.size(context)).sum();
        let is_cooperative = kernel.features.contains(&Feature::CooperativeMatrices);
        ensure!(
            bytes <= if is_cooperative { COOPERATIVE_BYTES } else { WORKGROUP_BYTES },
            "uses {bytes} bytes of workgroup memory"
        );
        Ok(())
    })
}

#[test]
fn optimizer_control_is_as_in_rust() -> Result<()> {
    let control = shaders::control();
    let found = std::cell::Cell::new(0);
    for_each(|_, shader| {
        let named = shader.module.types.iter().find(|(_, ty)| ty.name.as_deref() == Some(control.name));
        named.map_or(Ok(()), |(ty, _)| {
            found.set(found.get() + 1);
            compare_struct(&shader.module, ty, &control)
        })
    })?;
    ensure!(found.get() > 0, "no kernel has a struct {}", control.name);
    Ok(())
}

#[test]
fn names_differ() -> Result<()> {
    let mut names: Vec<&str> = shaders::all().iter().map(|kernel| kernel.name).collect();
    names.sort_unstable();
    ensure!(
        names.windows(2).all(|pair| pair[0] != pair[1]),
        "two kernels share a name, the key of the pipeline cache: {names:?}"
    );
    Ok(())
}

#[test]
fn every_file_is_part_of_a_kernel() -> Result<()> {
    let kernels = shaders::all();
    let unused: Vec<String> =
        files()?.into_iter().filter(|(_, text)| !kernels.iter().any(|k| k.source.contains(text))).map(|(name, _)| name).collect();
    ensure!(unused.is_empty(), "no kernel contains shaders/{}", unused.join(", shaders/"));
    Ok(())
}

#[test]
fn no_builtin_elementary_functions() -> Result<()> {
    // They are far off, or NaN for large arguments, on some devices: math.wgsl has our own.
    const FORBIDDEN: [&str; 14] =
        ["exp", "exp2", "log", "log2", "pow", "tanh", "sinh", "cosh", "sin", "cos", "tan", "asinh", "acosh", "atanh"];
    let mut found = Vec::new();
    for (name, text) in files()? {
        for (number, line) in text.lines().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            let mut words = code.split(|c: char| !(c.is_alphanumeric() || c == '_' || c == '('));
            let is_call = |word: &&str| FORBIDDEN.iter().any(|f| word.split('(').rev().skip(1).any(|part| part == *f));
            if let Some(word) = words.find(is_call) {
                found.push(format!("shaders/{name}:{}: {word}..", number + 1));
            }
        }
    }
    ensure!(found.is_empty(), "built-in elementary functions:\n{}", found.join("\n"));
    Ok(())
}

//! Copies the Triton kernels to `OUT_DIR/kernels`, from where maturin puts them into the wheel.

use std::path::Path;
use std::{env, fs, io};

fn copy_python(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let path = entry?.path();
        let Some(name) = path.file_name() else { continue };
        if path.is_dir() {
            if name != "__pycache__" {
                copy_python(&path, &to.join(name))?;
            }
        } else if path.extension().is_some_and(|extension| extension == "py") {
            fs::copy(&path, to.join(name))?;
        }
    }
    Ok(())
}

fn main() -> io::Result<()> {
    let from = Path::new("../../kernels");
    let to = Path::new(&env::var_os("OUT_DIR").unwrap_or_default()).join("kernels");
    if to.exists() {
        fs::remove_dir_all(&to)?;
    }
    copy_python(from, &to)?;
    println!("cargo::rerun-if-changed=../../kernels");
    println!("cargo::rerun-if-changed=build.rs");
    Ok(())
}

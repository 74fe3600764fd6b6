//! Compiles the service stubs alone; the messages are those of `steadfast-api`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=../proto");
    let files = protox::compile(["steadfast/trust/v1/trust.proto"], ["../proto"])?;
    tonic_prost_build::configure()
        .extern_path(".steadfast.trust.v1", "::steadfast_api::trust::v1")
        .build_transport(false)
        .compile_fds(files)?;
    Ok(())
}

//! Compiles the bridge to MLX, where it is wanted.

fn main() {
    #[cfg(feature = "primitive")]
    {
        println!("cargo::rerun-if-changed=glue/computed.cpp");
        println!("cargo::rerun-if-env-changed=DEP_MLX_INCLUDE");
        let include = std::env::var("DEP_MLX_INCLUDE")
            .expect("mlx-sys tells where MLX's headers are; on Linux run scripts/setup first");
        cc::Build::new()
            .cpp(true)
            .std("c++20")
            .warnings(false)
            .includes(std::env::split_paths(&include))
            .file("glue/computed.cpp")
            .compile("mlx_pipe_bridge");
    }
}

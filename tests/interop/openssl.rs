//! Promise: our certificates are certificates: OpenSSL accepts our chains and sees TLS 1.3.

use std::path::Path;
use std::process::{Command, Stdio};

use steadfast_test_rig::app::App;
use steadfast_test_rig::process::{binary_path, free_addr};
use steadfast_test_rig::{Mesh, MeshConfig, PodSpec};

#[tokio::test(flavor = "multi_thread")]
async fn openssl_accepts_our_chains_and_sees_tls_1_3() {
    let mesh = Mesh::start(MeshConfig::default()).await;
    let app = App::http(free_addr()).await.unwrap();
    let api = mesh.pod(PodSpec::new("api", &[app.addr.port()]));
    api.ready().await;
    let (anchors, chain) = (mesh.dir().join("anchors.pem"), mesh.dir().join("chain.pem"));
    let dir = mesh.dir().display().to_string();
    std::fs::write(&anchors, steadfast(&["trust", "bundle", "--pem", "--dir", &dir])).unwrap();
    std::fs::write(&chain, steadfast(&["identity", "demo/api-0", "--pem", "--dir", &dir])).unwrap();

    // 1. The chain that the workload holds, as a server's and as a client's.
    for purpose in ["sslserver", "sslclient"] {
        let output = openssl(
            &["verify", "-x509_strict", "-purpose", purpose],
            &[("-CAfile", &anchors), ("-untrusted", &chain)],
            &[&chain],
        );
        assert!(output.contains(": OK"), "{purpose}: {output}");
    }

    // 2. A handshake with the sidecar and one with the identity service.
    let workload = "api.demo.serviceaccount.identity.steadfast.cluster.local";
    let identity = "steadfast-identity.steadfast.serviceaccount.identity.steadfast.cluster.local";
    for (addr, name) in [(api.inbound, workload), (mesh.identity_addr, identity)] {
        let addr = addr.to_string();
        let output = openssl(
            &[
                "s_client",
                "-connect",
                &addr,
                "-servername",
                name,
                "-verify_return_error",
                "-verify_hostname",
                name,
            ],
            &[("-CAfile", &anchors)],
            &[],
        );
        assert!(output.contains("Verification: OK"), "{name}: {output}");
        assert!(output.contains("TLSv1.3"), "{name}: {output}");
        assert!(!output.contains("New session ticket") && !output.contains("Resumption PSK:"));
    }

    // 3. An older TLS is refused.
    let addr = mesh.identity_addr.to_string();
    let output = openssl(&["s_client", "-tls1_2", "-connect", &addr], &[], &[]);
    assert!(output.contains("alert protocol version"), "{output}");
}

fn steadfast(args: &[&str]) -> Vec<u8> {
    let output = Command::new(binary_path("steadfast")).args(args).output().unwrap();
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

fn openssl(args: &[&str], files: &[(&str, &Path)], last: &[&Path]) -> String {
    let mut command = Command::new("openssl");
    command.args(args);
    for (flag, file) in files {
        command.arg(flag).arg(file);
    }
    let output = command.args(last).stdin(Stdio::null()).output().expect("openssl runs");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    text(&output.stdout) + &text(&output.stderr)
}

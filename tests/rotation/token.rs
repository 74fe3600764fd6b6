//! Promise: where a PKCS#11 token is chosen, the keys of new anchors are made in it, sign in it and
//! are destroyed in it; a token that is away is said and heals; a wrong PIN is tried once.
//!
//! The token is SoftHSM's: real PKCS#11, in files.

use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use http::StatusCode;
use steadfast_api::KeyId;
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::trust_domain::{AnchorRecord, AnchorState, Request};
use steadfast_test_rig::mesh::ready;
use steadfast_test_rig::metrics::get;
use steadfast_test_rig::process::{Spec, free_addr};
use steadfast_test_rig::{Mesh, MeshConfig, Process, until};

use crate::support::{Field, without_a_failed_request};

#[tokio::test(flavor = "multi_thread")]
async fn new_anchors_live_in_the_token_and_sign_and_end_there() {
    let hsm = SoftHsm::new();
    hsm.write_pin("9999");
    let config = MeshConfig {
        rotation_args: hsm.args(),
        rotation_env: vec![hsm.env()],
        ..MeshConfig::rotating()
    };
    let field = Field::start(config).await;
    let mesh = &field.mesh;
    let rotation = mesh.rotation.as_ref().unwrap();

    // 1. A wrong PIN is said, and tried no second time.
    unready(mesh, &["anchor_keys", "does not take the PIN", "pin"]).await;
    unready(mesh, &["it was refused before"]).await;
    assert!(!rotation.log().contains("9999"), "no PIN is ever logged");
    hsm.write_pin(PIN);
    ready("steadfast-rotation", mesh.rotation_admin).await;

    let story = async {
        // 2. The standby is gone: the next one is made in the token.
        let old = taint_standby(mesh).await;
        let first = new_standby(mesh, old).await;
        assert!(!mesh.dir().join(format!("keys/anchors/{}.key", first.id)).exists());
        assert_eq!(hsm.objects(), 2, "a key and its public half");
        // 3. Its turn comes: the token signs its issuer, and has the key of the next standby.
        rotate(mesh, first.id).await;
        assert_eq!(hsm.objects(), 4);
        // 4. The token is away when a key of it is to be destroyed: that is said, and it waits.
        hsm.unplug();
        let second = taint_standby(mesh).await;
        unready(mesh, &["trust_domain", TOKEN]).await;
        hsm.plug_in();
        // 5. It is back: the key is destroyed in it, and the next one is made.
        new_standby(mesh, second).await;
        ready("steadfast-rotation", mesh.rotation_admin).await;
        let destroyed = ["the key of an anchor is destroyed", &second.to_string()];
        rotation.logged(&destroyed, MOMENT).await;
        assert_eq!(hsm.objects(), 4, "the active one's and the new standby's");
    };
    without_a_failed_request(field.load(), story).await;
    // A controller that was not given the token does nothing: it would take its keys for destroyed.
    let spec = Spec::ours("tokenless", "steadfast-rotation")
        .args(["--dir", &mesh.dir().display().to_string(), "--admin", &free_addr().to_string()])
        .args(["--identity-addr", &mesh.identity_addr.to_string()]);
    let process = Process::start(&mesh.logs(), spec);
    process.logged(&["was started without it", "--anchor-keys pkcs11"], READY).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_cannot_be_used_is_named_with_module_and_fix() {
    let hsm = SoftHsm::new();
    hsm.write_pin(PIN);
    let mesh = Mesh::start(MeshConfig::default()).await;
    let open_pin = hsm.dir.path().join("open.pin");
    fs::write(&open_pin, PIN).unwrap();
    let open_pin = open_pin.display().to_string();
    for (flag, value, expected) in [
        ("--pkcs11-module", "/no/such.so", ["--pkcs11-module /no/such.so", "cannot be loaded"]),
        ("--pkcs11-token", "other", ["--pkcs11-token \\\"other\\\"", TOKEN]),
        ("--pkcs11-pin-file", "/no/such.pin", ["--pkcs11-pin-file /no/such.pin", "cannot be read"]),
        ("--pkcs11-pin-file", &open_pin, ["0644", "chmod 600"]),
    ] {
        let admin = free_addr();
        let (name, variable) = hsm.env();
        let mut args = hsm.args();
        let at = args.iter().position(|arg| arg == flag).unwrap();
        args[at + 1] = value.to_owned();
        let spec = Spec::ours("rotation", "steadfast-rotation")
            .args(["--dir", &mesh.dir().display().to_string(), "--admin", &admin.to_string()])
            .args(["--identity-addr", &mesh.identity_addr.to_string()])
            .args(args)
            .env(&name, variable);
        let process = Process::start(&mesh.logs(), spec);
        let line = process.logged(&expected, READY).await;
        assert!(line.contains("cannot be used"), "{line}");
    }
    // A token that was not there at the beginning is found when it comes.
    hsm.unplug();
    let (name, variable) = hsm.env();
    let spec = Spec::ours("late", "steadfast-rotation")
        .args(["--dir", &mesh.dir().display().to_string(), "--admin", &free_addr().to_string()])
        .args(["--identity-addr", &mesh.identity_addr.to_string()])
        .args(hsm.args())
        .env(&name, variable);
    let process = Process::start(&mesh.logs(), spec);
    process.logged(&["has 0 tokens of this label", "it has none"], READY).await;
    hsm.plug_in();
    process.logged(&["the token of the anchors' keys answers"], READY).await;
}

/// SoftHSM with one token, in a directory.
struct SoftHsm {
    dir: tempfile::TempDir,
}

impl SoftHsm {
    fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("steadfast-hsm-").tempdir().unwrap();
        let hsm = Self { dir };
        fs::create_dir(hsm.tokens()).unwrap();
        let tokens = hsm.tokens().display().to_string();
        let text = format!("directories.tokendir = {tokens}\nobjectstore.backend = file\n");
        fs::write(hsm.conf(), text).unwrap();
        let output = Command::new("softhsm2-util")
            .args(["--init-token", "--free", "--label", TOKEN, "--pin", PIN, "--so-pin", "5678"])
            .env("SOFTHSM2_CONF", hsm.conf())
            .output()
            .expect("softhsm2-util runs: install softhsm2");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        hsm
    }

    fn args(&self) -> Vec<String> {
        let module = MODULES.iter().find(|module| Path::new(module).exists());
        let pin = self.pin().display().to_string();
        let args =
            ["--anchor-keys", "pkcs11", "--pkcs11-module", module.expect("SoftHSM's module")];
        let args = args.into_iter().chain(["--pkcs11-token", TOKEN, "--pkcs11-pin-file", &pin]);
        args.map(str::to_owned).collect()
    }

    fn env(&self) -> (String, String) {
        ("SOFTHSM2_CONF".to_owned(), self.conf().display().to_string())
    }

    /// A new file, as a person's editor writes it.
    fn write_pin(&self, pin: &str) {
        let draft = self.dir.path().join("pin.draft");
        let mut file =
            OpenOptions::new().write(true).create_new(true).mode(0o600).open(&draft).unwrap();
        writeln!(file, "{pin}").unwrap();
        fs::rename(draft, self.pin()).unwrap();
    }

    /// How many objects are in the token.
    fn objects(&self) -> usize {
        let token = fs::read_dir(self.tokens()).unwrap().next().unwrap().unwrap().path();
        let files = fs::read_dir(token).unwrap().map(|entry| entry.unwrap().path());
        let is_object = |path: &PathBuf| {
            path.extension().is_some_and(|extension| extension == "object")
                && !path.ends_with("token.object")
        };
        files.filter(is_object).count()
    }

    fn unplug(&self) {
        fs::rename(self.tokens(), self.dir.path().join("unplugged")).unwrap();
        fs::create_dir(self.tokens()).unwrap();
    }

    fn plug_in(&self) {
        fs::remove_dir(self.tokens()).unwrap();
        fs::rename(self.dir.path().join("unplugged"), self.tokens()).unwrap();
    }

    fn tokens(&self) -> PathBuf {
        self.dir.path().join("tokens")
    }

    fn conf(&self) -> PathBuf {
        self.dir.path().join("softhsm2.conf")
    }

    fn pin(&self) -> PathBuf {
        self.dir.path().join("pin")
    }
}

/// The controller is not ready, for a reason that holds all of these texts.
async fn unready(mesh: &Mesh, texts: &[&str]) {
    until(&format!("/ready says {texts:?}"), READY, || async {
        let (status, reason) = get(mesh.rotation_admin, "/ready").await?;
        let says = status != StatusCode::OK && texts.iter().all(|text| reason.contains(text));
        if says { Ok(()) } else { Err(format!("{status}: {reason}")) }
    })
    .await;
}

/// The standby is stolen: it goes at once, and another is made.
async fn taint_standby(mesh: &Mesh) -> KeyId {
    let old = standby(&mesh.trust_domain().await.0).unwrap().id;
    let deadline = Duration::from_secs(60);
    mesh.change_trust(|state| state.taint(old, "a test".to_owned(), deadline).unwrap()).await;
    old
}

async fn new_standby(mesh: &Mesh, old: KeyId) -> AnchorRecord {
    let state = settled(mesh, |state| {
        standby(state).is_some_and(|standby| standby.id != old) && state.anchor(old).is_none()
    });
    let new = standby(&state.await).unwrap().clone();
    let expected = format!("pkcs11:token={TOKEN};object=steadfast-anchor-{}", new.id);
    assert_eq!(new.key_ref, expected);
    new
}

async fn rotate(mesh: &Mesh, to: KeyId) {
    let order = |state: &mut TrustDomainState| {
        let (by, at) = ("a test".to_owned(), state.activated_at);
        state.request(Request { by, at, anchor: None, canary: None, replaces: None }).unwrap();
    };
    mesh.change_trust(order).await;
    settled(mesh, |state| {
        state.active_anchor().is_some_and(|active| active.id == to) && standby(state).is_some()
    })
    .await;
}

/// Nothing is under way, and it is as expected.
async fn settled(mesh: &Mesh, is_so: impl Fn(&TrustDomainState) -> bool) -> TrustDomainState {
    until("the mesh has settled", ROTATION, || async {
        let (_, page) = get(mesh.rotation_admin, "/rotation.json").await?;
        let state = mesh.trust_domain().await.0;
        let idle = state.rotation.is_none() && state.requested.is_none();
        if idle && state.condemned.is_empty() && is_so(&state) { Ok(state) } else { Err(page) }
    })
    .await
}

fn standby(state: &TrustDomainState) -> Option<&AnchorRecord> {
    state.in_state(AnchorState::Standby).next()
}

const TOKEN: &str = "steadfast";
const PIN: &str = "1234";
/// Debian's, and where others have it.
const MODULES: [&str; 3] = [
    "/usr/lib/softhsm/libsofthsm2.so",
    "/usr/lib64/pkcs11/libsofthsm2.so",
    "/usr/local/lib/softhsm/libsofthsm2.so",
];
const READY: Duration = Duration::from_secs(60);
const ROTATION: Duration = Duration::from_secs(150);
const MOMENT: Duration = Duration::from_secs(10);

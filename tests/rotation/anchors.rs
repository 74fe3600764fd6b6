//! Promise: anchors of somebody else's CA are rotated to and from under load, and no request fails.
//!
//! The anchors are made by openssl, as an operator would; what he does goes through the command
//! line. One mesh goes through all of them, since each rotation waits for its fences.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use steadfast_api::KeyId;
use steadfast_rotation_protocol::trust_domain::{AnchorState, Outcome, Request};
use steadfast_test_rig::metrics::get;
use steadfast_test_rig::process::binary_path;
use steadfast_test_rig::{Mesh, MeshConfig, until};

use crate::support::{Field, without_a_failed_request};

#[tokio::test(flavor = "multi_thread")]
async fn anchors_of_openssl_are_rotated_to_and_from_under_load_without_a_failed_request() {
    let field = Field::start(MeshConfig::rotating()).await;
    let owner = Owner { mesh: &field.mesh, dir: field.mesh.dir().join("owner") };
    let story = async {
        let prepared = owner.prepares_an_anchor_with_an_intermediate();
        owner.goes_to_an_anchor_whose_key_is_given_away().await;
        owner.goes_to_the_one_that_was_prepared(prepared).await;
        owner.goes_to_an_anchor_whose_issuer_is_waited_for().await;
        owner.goes_back_to_an_anchor_of_the_mesh_s_own().await;
    };
    without_a_failed_request(field.load(), story).await;
}

/// The person who has the keys of the anchors.
struct Owner<'a> {
    mesh: &'a Mesh,
    dir: PathBuf,
}

impl Owner<'_> {
    /// P-384, and an intermediate below it that signs the issuer, by the very command that is
    /// printed: it begins now, and is used once it is a minute old.
    fn prepares_an_anchor_with_an_intermediate(&self) -> KeyId {
        std::fs::create_dir(&self.dir).unwrap();
        self.write("index.txt", "");
        self.write("ca.cnf", CA);
        let root = self.root("p384", "ec -pkeyopt ec_paramgen_curve:P-384");
        let anchor = self.import(&["anchor", "import", &root]);
        let signer = "-cert p384.pem -keyfile p384.key";
        self.authority("middle", "rsa -pkeyopt rsa_keygen_bits:3072", signer);
        let command = self.request().replace("root.", "middle.");
        self.openssl(command.strip_prefix("openssl ").unwrap());
        let chain = self.read("issuer.pem") + &self.read("middle.pem");
        self.write("chain.pem", &chain);
        self.import(&["issuer", "import", &self.path("chain.pem")]);
        anchor
    }

    /// P-256, with its key: the controller signs issuers under it by itself.
    async fn goes_to_an_anchor_whose_key_is_given_away(&self) {
        let old = self.active().await;
        let root = self.root("p256", "ec -pkeyopt ec_paramgen_curve:P-256");
        let anchor = self.import(&["anchor", "import", &root, "--key", &self.path("p256.key")]);
        assert!(self.key(anchor).exists());
        self.order_rotation(Some(anchor)).await;
        self.rotated_to(anchor, old).await;
    }

    /// Nobody is waited for. Each workload then shows three certificates, which OpenSSL accepts, and
    /// the key that was given away is destroyed.
    async fn goes_to_the_one_that_was_prepared(&self, anchor: KeyId) {
        let old = self.active().await;
        self.order_rotation(Some(anchor)).await;
        self.rotated_to(anchor, old).await;
        until("the key of the old anchor is destroyed", MOMENT, || async {
            let key = self.key(old);
            if key.exists() { Err(key.display().to_string()) } else { Ok(()) }
        })
        .await;
        let shown = self.steadfast(&["identity", "demo/api-0", "--pem"]);
        assert_eq!(shown.matches("BEGIN CERTIFICATE").count(), 3, "{shown}");
        self.write("shown.pem", &shown);
        let verify = "verify -x509_strict -purpose sslserver -CAfile p384.pem -untrusted shown.pem";
        self.openssl(&format!("{verify} shown.pem"));
    }

    /// RSA-4096: the rotation is ordered first, waits for the owner and says so. The old anchor is
    /// external too, and its key is nobody's business.
    async fn goes_to_an_anchor_whose_issuer_is_waited_for(&self) {
        let old = self.active().await;
        let root = self.root("rsa", "rsa -pkeyopt rsa_keygen_bits:4096");
        let anchor = self.import(&["anchor", "import", &root]);
        self.order_rotation(Some(anchor)).await;
        until("the owner is waited for", ROTATION, || async {
            let (_, page) = get(self.mesh.rotation_admin, "/rotation.json").await?;
            let waits = page.contains("\"signature\"") && page.contains(&anchor.to_string());
            if waits { Ok(()) } else { Err(page) }
        })
        .await;
        let rotation = self.mesh.rotation.as_ref().unwrap();
        let wanted = ["an issuer under an external anchor is wanted", &anchor.to_string()];
        rotation.logged(&wanted, MOMENT).await;
        self.request();
        self.certify("issuer", "-cert rsa.pem -keyfile rsa.key -days 90");
        self.import(&["issuer", "import", &self.path("issuer.pem")]);
        self.rotated_to(anchor, old).await;
        rotation.logged(&["an external anchor is gone", &old.to_string()], MOMENT).await;
        // What was withdrawn never comes back.
        let refused = self.refused(&["anchor", "import", &self.path("p384.pem")]);
        assert!(refused.contains("was withdrawn"), "{refused}");
    }

    /// The standby has waited all the while; what it leaves is an RSA anchor whose key is elsewhere.
    async fn goes_back_to_an_anchor_of_the_mesh_s_own(&self) {
        let old = self.active().await;
        let state = self.mesh.trust_domain().await.0;
        let standby = state.in_state(AnchorState::Standby).next().unwrap().id;
        self.order_rotation(None).await;
        self.rotated_to(standby, old).await;
        let web = self.steadfast(&["identity", "demo/web-0", "-o", "json"]);
        assert!(web.contains(&standby.to_string()), "{web}");
    }

    async fn active(&self) -> KeyId {
        self.mesh.trust_domain().await.0.active_anchor().unwrap().id
    }

    fn key(&self, anchor: KeyId) -> PathBuf {
        self.mesh.dir().join(format!("keys/anchors/{anchor}.key"))
    }

    async fn order_rotation(&self, anchor: Option<KeyId>) {
        // What was condemned before is destroyed first, so that nobody writes meanwhile.
        until("nothing is left of the rotation before", MOMENT, || async {
            let state = self.mesh.trust_domain().await.0;
            if state.condemned.is_empty() { Ok(()) } else { Err(format!("{:?}", state.condemned)) }
        })
        .await;
        let order = |state: &mut steadfast_rotation_protocol::TrustDomainState| {
            let (by, at) = ("a test".to_owned(), state.activated_at);
            state.request(Request { by, at, anchor, canary: None, replaces: None }).unwrap();
        };
        self.mesh.change_trust(order).await;
    }

    async fn rotated_to(&self, anchor: KeyId, old: KeyId) {
        let state = until("the rotation is over", ROTATION, || async {
            let (_, page) = get(self.mesh.rotation_admin, "/rotation.json").await?;
            let state = self.mesh.trust_domain().await.0;
            let over = state.rotation.is_none() && state.requested.is_none();
            if over { Ok(state) } else { Err(page) }
        })
        .await;
        let past = state.past.last().unwrap();
        assert_eq!(past.outcome, Outcome::Done);
        assert_eq!(state.active_anchor().map(|active| active.id), Some(anchor));
        assert!(state.tombstones.contains(&old) && state.anchor(old).is_none());
        assert_eq!(state.in_state(AnchorState::Standby).count(), 1, "the standby has stayed");
        assert_eq!(state.active_issuer().map(|issuer| issuer.anchor_id), Some(anchor));
    }

    /// A root; the path of its certificate.
    fn root(&self, name: &str, key: &str) -> String {
        self.authority(name, key, &format!("-selfsign -keyfile {name}.key"));
        self.path(&format!("{name}.pem"))
    }

    fn authority(&self, name: &str, key: &str, signer: &str) {
        let files = format!("-keyout {name}.key -out {name}.csr");
        self.openssl(&format!("req -new -newkey {key} -nodes {files} -subj /O=Owner/CN={name}"));
        let usage = "keyUsage=critical,keyCertSign,cRLSign\nsubjectKeyIdentifier=hash\n";
        let text =
            format!("basicConstraints=critical,CA:true\n{usage}authorityKeyIdentifier=keyid\n");
        self.write(&format!("{name}.ext"), &text);
        self.certify(name, &format!("{signer} -days 3000"));
    }

    /// A certificate that began a while ago, as those of most CAs do.
    fn certify(&self, name: &str, signer: &str) {
        let files = format!("-in {name}.csr -extfile {name}.ext -out {name}.pem");
        let begins = "-startdate 20260101000000Z";
        self.openssl(&format!("ca -batch -notext -config ca.cnf {files} {begins} {signer}"));
    }

    /// Keeps what `issuer request` prints; the command that it prints too.
    fn request(&self) -> String {
        let told = self.steadfast(&["issuer", "request", "-o", "json"]);
        let told: serde_json::Value = serde_json::from_str(&told).unwrap();
        let text = |field: &str| told[field].as_str().unwrap().to_owned();
        self.write("issuer.csr", &text("csr"));
        self.write("issuer.ext", &text("extensions"));
        text("command")
    }

    /// Runs an import; the id of what was imported, or of the anchor of it.
    fn import(&self, args: &[&str]) -> KeyId {
        let told = self.steadfast(&[args, &["-o", "json"]].concat());
        let told: serde_json::Value = serde_json::from_str(&told).unwrap();
        let id = told.get("id").or_else(|| told.get("issuer")).unwrap();
        id.as_str().unwrap().parse().unwrap()
    }

    fn refused(&self, args: &[&str]) -> String {
        let output = self.command(args).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8(output.stderr).unwrap()
    }

    fn steadfast(&self, args: &[&str]) -> String {
        run(&mut self.command(args))
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(binary_path("steadfast"));
        command.args(args).arg("--dir").arg(self.mesh.dir());
        command
    }

    fn openssl(&self, args: &str) {
        run(Command::new("openssl").args(args.split_whitespace()).current_dir(&self.dir));
    }

    fn path(&self, name: &str) -> String {
        self.dir.join(name).display().to_string()
    }

    fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.dir.join(name)).unwrap()
    }

    fn write(&self, name: &str, text: &str) {
        write(&self.dir.join(name), text);
    }
}

fn write(path: &Path, text: &str) {
    std::fs::write(path, text).unwrap();
}

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {stderr}");
    String::from_utf8(output.stdout).unwrap()
}

/// As little of a CA as `openssl ca` works with.
const CA: &str = "\
[ca]
default_ca = owner
[owner]
database = index.txt
new_certs_dir = .
rand_serial = yes
default_md = sha256
policy = any
unique_subject = no
[any]
organizationName = optional
commonName = supplied
";
/// Four fences, and the rounds between them.
const ROTATION: Duration = Duration::from_secs(150);
const MOMENT: Duration = Duration::from_secs(10);

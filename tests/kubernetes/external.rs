//! Anchors and issuers that other tools keep: trust-manager writes the bundle, the issuer lies in a
//! Secret as cert-manager keeps it.

use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose, date_time_ymd,
};
use serde_json::{Value, json};
use steadfast_test_rig::cluster::{ANCHORS_NAMESPACE, CONTROL_NAMESPACE, Cluster};
use steadfast_test_rig::until;

use crate::application::Application;
use crate::trust::{ROTATION, SHORT, active, answered, lives, state};

#[tokio::test]
async fn what_other_tools_keep_is_rotated_to_and_stays_until_nobody_needs_it() {
    let cluster = Cluster::start(1).await;
    cluster.import("steadfast-test-app");
    let external = ["external.bundleConfigMap=mesh-roots", "external.issuerSecret=mesh-issuer"];
    cluster.install(&[&SHORT[..], &external].concat()).await;
    cluster.define("trust-manager");
    let tls = cluster.dir().join("trust-manager");
    std::fs::create_dir(&tls).expect("the folder is ours");
    for (from, to) in [("server.crt", "tls.crt"), ("server.key", "tls.key")] {
        std::fs::copy(cluster.dir().join(from), tls.join(to)).expect("the API server has one");
    }
    let webhook = format!("--webhook-certificate-dir={}", tls.display());
    let namespace = "--trust-namespace=default";
    let _trust_manager = cluster.companion(
        "trust-manager",
        &[namespace, &webhook, "--webhook-port=9443", "--leader-elect=false"],
    );
    let application = Application::start(&cluster, "shop");
    answered(&application, 50).await;
    let pods = lives(&application);

    // Both are there: the mesh leaves its own anchor.
    let (old, new) = (Root::new("old"), Root::new("new"));
    list(&cluster, &[&old]);
    keep(&cluster, &old.issuer_of(2025));
    settled_under(&cluster, &old).await;

    // It is renewed, and lives for less than the one before: the anchor stays.
    let before = state(&cluster).unwrap()["active_issuer"].clone();
    keep(&cluster, &old.issuer_of(2026));
    until("the renewed issuer signs", ROTATION, || async {
        let state = state(&cluster)?;
        let renewed = state["active_issuer"] != before && state["issuer_rotation"].is_null();
        if renewed { Ok(()) } else { Err(state["issuer_rotation"].to_string()) }
    })
    .await;
    assert_eq!(active(&state(&cluster).unwrap()), Some(old.id()));

    // An issuer under a root that is not listed is held, and told.
    keep(&cluster, &new.issuer_of(2025));
    condition(&cluster, "ProposalsTaken", "does not list: list it there").await;
    assert_eq!(active(&state(&cluster).unwrap()), Some(old.id()));
    let events = cluster.kubectl(&["events", "--all-namespaces"]);
    assert!(events.contains("ProposalHeld"), "{events}");
    let check = cluster.steadfast(&["check"]).unwrap_err();
    assert!(check.contains("does not list: list it there"), "{check}");

    // It is listed beside the old one: everybody goes to it, and the old one stays.
    list(&cluster, &[&old, &new]);
    condition(&cluster, "Rotating", "no more").await;
    let seen = state(&cluster).unwrap();
    assert_eq!(active(&seen), Some(new.id()));
    assert_eq!(anchor(&seen, &old)["state"], "Retiring");
    let status = cluster.steadfast(&["anchor", "status"]).unwrap_or_else(|said| said);
    assert!(status.contains("take it out there"), "{status}");

    // Until it is listed no more.
    list(&cluster, &[&new]);
    settled_under(&cluster, &new).await;
    assert_eq!(anchor(&state(&cluster).unwrap(), &old), Value::Null);
    // What was withdrawn comes back for nobody.
    list(&cluster, &[&old, &new]);
    condition(&cluster, "ProposalsTaken", "was withdrawn").await;

    // A tool that is taken away takes nothing with it.
    cluster.kubectl(&["delete", "bundle", "mesh-roots"]);
    condition(&cluster, "ProposalsTaken", "it is not there; what it listed before stays").await;
    assert_eq!(active(&state(&cluster).unwrap()), Some(new.id()));
    assert_eq!(lives(&application), pods, "a pod was created or restarted");
    let seen = application.report().expect("web tells").requests;
    answered(&application, seen + 100).await;
}

/// Somebody's own root.
struct Root(CertifiedIssuer<'static, KeyPair>);

impl Root {
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.not_after = date_time_ymd(2036, 1, 1);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().expect("a key");
        Self(CertifiedIssuer::self_signed(params, key).expect("it signs itself"))
    }

    /// As the state has it.
    fn id(&self) -> String {
        use rcgen::PublicKeyData as _;
        steadfast_api::KeyId::of_spki(&self.0.key().subject_public_key_info()).to_string()
    }

    fn pem(&self) -> String {
        certificate(self.0.der())
    }

    /// An issuer under it from this year on, as the entries of a Secret of cert-manager: without a path length, with
    /// the usages that its documents name for a mesh.
    fn issuer_of(&self, year: i32) -> [(&'static str, String); 3] {
        let mut params = CertificateParams::new(["identity.steadfast.cluster.local".to_owned()])
            .expect("a name");
        params.distinguished_name.push(DnType::CommonName, "identity.steadfast.cluster.local");
        params.not_before = date_time_ymd(year, 1, 1);
        // The later it begins, the sooner it ends.
        params.not_after = date_time_ymd(4055 - year, 1, 1);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyCertSign];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate().expect("a key");
        let issuer = params.signed_by(&key, &self.0).expect("the root signs");
        let private = pem::encode(&pem::Pem::new("PRIVATE KEY", key.serialize_der()));
        [("tls.crt", certificate(issuer.der())), ("tls.key", private), ("ca.crt", self.pem())]
    }
}

fn certificate(der: &[u8]) -> String {
    pem::encode(&pem::Pem::new("CERTIFICATE", der))
}

/// Has trust-manager list these roots.
fn list(cluster: &Cluster, roots: &[&Root]) {
    let sources: Vec<_> = roots.iter().map(|root| json!({ "inLine": root.pem() })).collect();
    let bundle = json!({
        "apiVersion": "trust.cert-manager.io/v1alpha1",
        "kind": "Bundle",
        "metadata": { "name": "mesh-roots" },
        "spec": {
            "sources": sources,
            "target": {
                "configMap": { "key": "ca-bundle.crt" },
                "namespaceSelector": {
                    "matchLabels": { "kubernetes.io/metadata.name": ANCHORS_NAMESPACE },
                },
            },
        },
    });
    cluster.apply(&bundle.to_string());
}

/// Keeps an issuer as cert-manager does, which overwrites the one before.
fn keep(cluster: &Cluster, entries: &[(&'static str, String)]) {
    let data: serde_json::Map<_, _> =
        entries.iter().map(|(name, text)| ((*name).to_owned(), json!(text))).collect();
    let secret = json!({
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": { "name": "mesh-issuer", "namespace": CONTROL_NAMESPACE },
        "type": "kubernetes.io/tls",
        "stringData": data,
    });
    cluster.apply(&secret.to_string());
}

async fn settled_under(cluster: &Cluster, root: &Root) {
    until("everybody is under the root", ROTATION, || async {
        let state = state(cluster)?;
        let there = active(&state) == Some(root.id()) && state["rotation"].is_null();
        let status = ["get", "trustdomain", "steadfast", "--output=jsonpath={.status}"];
        if there { Ok(()) } else { Err(cluster.try_kubectl(&status)?) }
    })
    .await;
}

fn anchor(state: &Value, root: &Root) -> Value {
    let anchors = state["anchors"].as_array().expect("a list");
    anchors.iter().find(|anchor| anchor["id"] == root.id()).cloned().unwrap_or_default()
}

/// Waits until a condition of the trust domain says so.
async fn condition(cluster: &Cluster, kind: &str, words: &str) {
    until(&format!("{kind} says {words:?}"), DEADLINE, || async {
        let found = cluster.try_kubectl(&["get", "trustdomain", "steadfast", "--output=json"])?;
        let found: Value = serde_json::from_str(&found).map_err(|error| error.to_string())?;
        let conditions = found["status"]["conditions"].as_array().cloned().unwrap_or_default();
        let condition = conditions.iter().find(|condition| condition["type"] == kind);
        let message = condition.and_then(|condition| condition["message"].as_str());
        match message {
            Some(message) if message.contains(words) => Ok(()),
            _ => Err(format!("{conditions:#?}")),
        }
    })
    .await;
}

/// A rotation may come first.
const DEADLINE: Duration = Duration::from_secs(180);

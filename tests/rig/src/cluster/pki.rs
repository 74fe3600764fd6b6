//! The cluster's own certificates: made anew for each, and of no use to another.

use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};

use pem::Pem;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair,
    PublicKeyData as _, SanType,
};

/// Where they are.
pub(super) struct Pki {
    pub(super) ca: PathBuf,
    pub(super) server: PathBuf,
    pub(super) server_key: PathBuf,
    /// By which the API server is known to kubelets.
    pub(super) client: PathBuf,
    pub(super) client_key: PathBuf,
    /// Signs the tokens of service accounts.
    pub(super) tokens: PathBuf,
    /// By which they are verified.
    pub(super) tokens_public: PathBuf,
}

impl Pki {
    /// Makes and writes all of them; the API server has these addresses.
    pub(super) fn write(dir: &Path, server: &[Ipv4Addr]) -> Self {
        let write = |name: &str, text: String| {
            let path = dir.join(name);
            std::fs::write(&path, text).expect("the folder is ours");
            path
        };
        let key = || KeyPair::generate().expect("a key");
        let mut params = named("steadfast test cluster", None);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca = CertifiedIssuer::self_signed(params, key()).expect("it signs itself");
        let signed = |params: CertificateParams, key: &KeyPair| {
            certificate(params.signed_by(key, &ca).expect("the CA signs").der())
        };
        let (server_key, client_key, tokens) = (key(), key(), key());
        let mut params = named("kube-apiserver", None);
        let names = ["localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"];
        for name in names {
            params.subject_alt_names.push(SanType::DnsName(name.try_into().expect("a name")));
        }
        for ip in server {
            params.subject_alt_names.push(SanType::IpAddress(IpAddr::V4(*ip)));
        }
        Self {
            ca: write("ca.crt", certificate(ca.der())),
            server: write("server.crt", signed(params, &server_key)),
            server_key: write("server.key", private(&server_key)),
            client: write("client.crt", signed(named("api", Some("system:masters")), &client_key)),
            client_key: write("client.key", private(&client_key)),
            tokens: write("tokens.key", private(&tokens)),
            tokens_public: write(
                "tokens.pub",
                pem::encode(&Pem::new("PUBLIC KEY", tokens.subject_public_key_info())),
            ),
        }
    }
}

fn certificate(der: &[u8]) -> String {
    pem::encode(&Pem::new("CERTIFICATE", der))
}

fn private(key: &KeyPair) -> String {
    pem::encode(&Pem::new("PRIVATE KEY", key.serialize_der()))
}

fn named(name: &str, group: Option<&str>) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    if let Some(group) = group {
        params.distinguished_name.push(DnType::OrganizationName, group);
    }
    params
}

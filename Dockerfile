# One image for each program:
#
#   docker build --target steadfast-identity --tag REGISTRY/steadfast-identity:0.1.0 .
#
# for steadfast-identity, -rotation, -control, -proxy and -init. Each holds its program and what it is
# linked with, and runs with a root that cannot be written to; all but the init step as nobody in
# particular.

FROM rust:1.95-bookworm AS build
WORKDIR /src
COPY . .
RUN cargo build --locked --profile dist --bins \
        --package steadfast-identity --package steadfast-rotation --package steadfast-control \
        --package steadfast-proxy

FROM gcr.io/distroless/cc-debian12:nonroot AS steadfast-identity
COPY --from=build /src/target/dist/steadfast-identity /
ENTRYPOINT ["/steadfast-identity"]

FROM gcr.io/distroless/cc-debian12:nonroot AS steadfast-rotation
COPY --from=build /src/target/dist/steadfast-rotation /
ENTRYPOINT ["/steadfast-rotation"]

FROM gcr.io/distroless/cc-debian12:nonroot AS steadfast-control
COPY --from=build /src/target/dist/steadfast-control /
ENTRYPOINT ["/steadfast-control"]

FROM gcr.io/distroless/cc-debian12:nonroot AS steadfast-proxy
COPY --from=build /src/target/dist/steadfast-proxy /
ENTRYPOINT ["/steadfast-proxy"]

# The init step writes rules with Debian's nft, or iptables where the kernel is older.
FROM debian:bookworm-slim AS steadfast-init
RUN apt-get update \
    && apt-get install --yes --no-install-recommends iptables nftables \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /src/target/dist/steadfast-init /
ENTRYPOINT ["/steadfast-init"]

#version 330
// Decide what a fragment of a person shows (skin, hair, a garment), paint it and light it.
// Garments are painted on the skin too, where the tights cover it: no hole can show skin through a shirt.

in vec3 world;
in vec3 turned;
in vec3 rest;
in vec2 texture_at;
in float arm;  // 0 at the shoulder, 1 at the wrist, -1 away from the arms
flat in int mesh;

layout(location = 0) out vec4 colour;
layout(location = 1) out float label;

const int FACE = 1, SKIN = 2, HAIR = 3, TOP = 4, BOTTOM = 5, SHOES = 6;

uniform sampler2D face_mask;  // red: lips, green: eyelids
uniform sampler2D print_picture;
uniform vec3 camera;
uniform vec3 light, light_colour, ambient;

uniform vec3 skin_colour, lip_colour, iris_colour, hair_colour, shoe_colour;
uniform vec3 top_colours[2], bottom_colours[2];
uniform int top_pattern, bottom_pattern;
uniform float pattern_period;
uniform vec4 print_box;  // left, bottom, right, top at rest; empty without a print

uniform vec3 left_eye;  // its middle at rest; the right eye is its mirror image
uniform float head_size;  // 1 for an adult
uniform float ear, chin;  // y and z at rest
uniform float hairline, hair_end;
uniform bool bald;
uniform float neckline, neck_dip, waist, leg_end, ankle, sleeve, skirt_end;
uniform bool skirt;

bool on_scalp(vec3 p) {
    vec3 q = (p - vec3(0.0, left_eye.yz)) / head_size;
    return q.z + 0.6 * q.y + 1.3 * max(0.0, q.y - 0.075) > hairline && q.z > -0.085;  // lower behind the ears
}

int part(vec3 p) {
    if (arm > 0.02) return arm < sleeve ? TOP : SKIN;
    if (p.z < ankle) return SHOES;
    if (p.z < leg_end) return SKIN;
    if (p.z < waist) return BOTTOM;
    float dip = p.y < 0.0 ? neck_dip * max(0.0, 1.0 - abs(p.x) / 0.07) : 0.0;
    if (p.z < neckline - dip) return TOP;
    if (!bald && on_scalp(p)) return HAIR;
    return p.z > chin && p.y < ear ? FACE : SKIN;
}

vec3 pattern(vec3 a, vec3 b, int kind, vec3 p) {
    vec2 q = vec2(p.x, p.z) / pattern_period;
    if (kind == 1) return mix(a, b, step(0.5, fract(q.y)));
    if (kind == 2) return mix(a, b, step(0.5, fract(q.x + 0.25)));
    if (kind == 3) return mix(a, b, 0.5 * step(0.5, fract(q.y)) + 0.5 * step(0.5, fract(q.x + 0.25)));
    if (kind == 4) { vec2 c = fract(q * 1.3) - 0.5; return mix(a, b, step(dot(c, c), 0.08)); }
    if (kind == 5) return p.x > 0.0 ? a : b;
    if (kind == 6) return p.z > 0.5 * (waist + neckline) || arm > 0.02 ? a : b;
    return a;
}

vec3 paint_top() {
    vec2 at = (rest.xz - print_box.xy) / (print_box.zw - print_box.xy);
    if (rest.y < 0.0 && arm < 0.02 && all(greaterThan(at, vec2(0.0))) && all(lessThan(at, vec2(1.0))))
        return texture(print_picture, vec2(at.x, 1.0 - at.y)).rgb;
    return pattern(top_colours[0], top_colours[1], top_pattern, rest);
}

vec3 paint_skin() {
    vec2 mask = texture(face_mask, vec2(texture_at.x, 1.0 - texture_at.y)).rg;
    vec3 c = mix(skin_colour, skin_colour * vec3(0.6, 0.45, 0.42), 0.5 * mask.g);
    c = mix(c, lip_colour, 0.9 * mask.r);
    vec3 q = (vec3(abs(rest.x), rest.yz) - left_eye) / head_size;
    if (q.y < 0.03 && abs(q.x) < 0.021 && abs(q.z - 0.023 + 0.1 * abs(q.x)) < 0.004) c = hair_colour * 0.7;  // brows
    return c;
}

vec3 paint_eye() {
    float far = length((vec2(abs(rest.x), rest.z) - left_eye.xz) / head_size);
    return far < 0.003 ? vec3(0.02) : far < 0.0072 ? iris_colour : vec3(0.93);
}

vec3 paint_hair() {
    float strand = sin(atan(rest.x, rest.y - left_eye.y - 0.08) * 34.0 + 9.0 * sin(rest.z * 25.0));
    return hair_colour * (0.92 + 0.10 * strand);
}

void main() {
    int shows = part(rest);
    if (mesh == 1 && (shows == SKIN || shows == FACE || shows == HAIR)) discard;
    if (mesh == 2) { if (!skirt || rest.z < skirt_end) discard; shows = BOTTOM; }
    if (mesh == 3) {
        vec3 q = (rest - vec3(0.0, left_eye.yz)) / head_size;
        if (bald || rest.z < hair_end || (q.y < 0.055 && q.z < 0.055)) discard;
        shows = HAIR;
    }
    if (mesh == 4) shows = FACE;
    if (mesh == 5) { if (bald || !on_scalp(rest) || rest.z < hair_end) discard; shows = HAIR; }

    vec3 base = shows == TOP ? paint_top()
              : shows == BOTTOM ? pattern(bottom_colours[0], bottom_colours[1], bottom_pattern, rest)
              : shows == SHOES ? shoe_colour * (rest.z < ankle - 0.075 ? 0.6 : 1.0)
              : shows == HAIR ? paint_hair()
              : mesh == 4 ? paint_eye() : paint_skin();

    vec3 n = normalize(turned), to_camera = normalize(camera - world);
    if (dot(n, to_camera) < 0.0) n = -n;
    float facing = dot(n, light);
    float lit = 0.7 * max(facing, 0.0) + 0.3 * (0.5 + 0.5 * facing);  // a soft terminator reads better than a hard one
    vec3 shine = light_colour * pow(max(dot(n, normalize(light + to_camera)), 0.0), 24.0);
    float gloss = shows == SKIN || shows == FACE ? 0.10 : shows == HAIR || shows == SHOES ? 0.12 : 0.0;
    colour = vec4(base * (ambient * (0.8 + 0.2 * n.z) + light_colour * lit) + gloss * shine, 1.0);
    label = float(shows) / 255.0;
}

#version 330
// The floor, the wall and the soft shadow under a person, found by following each viewing ray.

in vec3 ray;
layout(location = 0) out vec4 colour;
layout(location = 1) out float label;

uniform vec3 eye;
uniform vec3 ahead;  // horizontal direction of the wall, seen from the person
uniform float wall_distance;  // from the origin along `ahead`
uniform int wall_kind, floor_kind;
uniform vec3 wall_colours[2], floor_colours[2];
uniform float wall_period, floor_period, floor_turn;
uniform vec3 blobs[3];  // x, y and radius of round shadows
uniform vec3 tint;  // what the light does to the scene

void main() {
    float to_wall = (wall_distance - dot(eye, ahead)) / dot(ray, ahead);
    float to_floor = ray.z < 0.0 ? -eye.z / ray.z : 1e9;
    vec3 c;
    if (to_floor < to_wall || dot(ray, ahead) <= 0.0) {
        vec3 p = eye + to_floor * ray;
        vec2 q = mat2(cos(floor_turn), -sin(floor_turn), sin(floor_turn), cos(floor_turn)) * p.xy / floor_period;
        float mixed = 0.0;
        if (floor_kind == 1) mixed = mod(floor(q.x) + floor(q.y), 2.0);
        if (floor_kind == 2) mixed = fract(floor(q.x * 3.0) * 0.381966) * (0.9 + 0.1 * step(0.05, fract(q.x * 3.0)));
        if (floor_kind == 3) mixed = step(dot(p.xy, p.xy), 1.3 * floor_period * floor_period);
        c = mix(floor_colours[0], floor_colours[1], mixed);
        for (int i = 0; i < 3; ++i)
            c *= 1.0 - 0.45 * (1.0 - smoothstep(0.15, 1.0, length(p.xy - blobs[i].xy) / blobs[i].z));
    } else {
        vec3 p = eye + to_wall * ray;
        vec2 q = vec2(dot(p, vec3(-ahead.y, ahead.x, 0.0)), p.z) / wall_period;
        float mixed = 0.0;
        if (wall_kind == 1) mixed = clamp(p.z / 3.0, 0.0, 1.0);
        if (wall_kind == 2) mixed = step(0.5, fract(q.x));
        if (wall_kind == 3) mixed = fract(sin(dot(floor(q), vec2(12.9898, 78.233))) * 43758.5453);
        if (wall_kind == 4) mixed = step(1.0, q.y);
        c = mix(wall_colours[0], wall_colours[1], mixed);
        c *= p.z < 0.1 ? 0.8 : 1.0;  // a skirting board
    }
    colour = vec4(c * tint, 1.0);
    label = 0.0;
}
